"""一批的损失：测试里常要算一次就看。"""

from loss import Loss


def loss_of(model, batch, shared=None):
    """这一批的损失之和；给了 shared，就合用一行。"""
    loss = Loss(model)
    loss.shared_row = shared
    return loss(batch)
