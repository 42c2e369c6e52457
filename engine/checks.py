"""检验：说出结果，留下最好的，连着变差时提醒。

check       检验一次，再写一段给人看
keep_best   要读第二遍的，留出的文字上最好的那一刻另存一份：再练下去，也许只是在背书
warn        检验损失连着升了三次，说一声
settle      练完了：最后的不比它差，不留两份
"""

import math
from itertools import pairwise

from engine import words
from engine.checkpoint import read
from engine.expert_load import expert_loads
from engine.progress import rereads
from settings.say import say, say_above_bar

RISES = 3


def check(run, exam, max_tokens: int, everything: bool = False) -> dict:
    """检验，再写一段给人看；返回写进记录的几项。

    Args:
        run: 这一次训练。
        exam: loss.py 的 `Exam`。
        max_tokens: 至多用多少词元。
        everything: 最后的那一次，数据多，不与平时的比高低。
    """
    run.micro_rows = []  # 内存若不够，是检验的这一批太大
    (loss, bpc), old = exam.measure(max_tokens), exam.measure_old(max_tokens)
    load = expert_loads(run._model, run.world)  # 专家混合：留出的数据上，各位专家的负载
    run.progress.checked(loss, bpc, everything)
    sample = ""
    if math.isfinite(loss):
        with run._parallel.gathered():
            sample = exam.write()
    step, shown = run.progress.step, exam.show(sample)
    say_above_bar(words.exam_result(step, (loss, bpc), old, load, shown))
    more = {"val_load": load.rounded()} if load else {}
    if everything:
        more["val_everything"] = True
    if old:
        more |= {"val_loss_old": old[0], "val_bpc_old": old[1]}
    return {"val_loss": loss, "val_bpc": bpc, "sample": sample, **more}


def keep_best(run) -> None:
    """刚才的检验若是最好的，另存一份；不读第二遍的，每一步读的都是新的，背不了书，不必存。"""
    if rereads(run) and run.progress.best_step == run.progress.step:
        run.saver.save_best(run.state)


def warn(run) -> None:
    """平时的检验损失连着升了三次，说一声；再升下去不再说。"""
    usual = [row for row in run.metrics.rows if not row.get("val_everything")]
    losses = [row["val_loss"] for row in usual if row.get("val_loss") is not None]
    rises = [later > sooner for sooner, later in pairwise(losses)]
    if all(rises[-RISES:]) and len(rises) >= RISES and not any(rises[-RISES - 1 : -RISES]):
        say_above_bar(words.rising(run))


def settle(run, exam) -> None:
    """练完了：用平时的量法，最后的不比另存的差，就不留两份；比它差的，说最好的在哪里。

    终究没有读第二遍的也不留：练到几点的，后来才改得只读一遍。
    """
    if not rereads(run) or exam.measure(run.config.eval_tokens)[0] <= run.progress.best_val_loss:
        run.saver.forget_best()
    elif run.folder.best.exists():
        say(words.best(run, read(run.folder.best, mmap=True)["progress"]))
