"""载入要看的模型。"""

from pathlib import Path

from config import Config, UserError
from engine.device import Device
from engine.speed import load_for_chat
from generate import Speaker
from settings.resolve import load_config


def load_speaker(checkpoint: str | None, device: str = "auto") -> Speaker:
    """用 fp32 载入一个模型；没有指定就找默认训练写下的，微调过的优先。

    Raises:
        UserError: 没有检查点，或者不能用。
    """
    if checkpoint is None:
        out = Path(load_config("pretrain", [])[0].out_dir)
        found = [path for path in (out / "sft.pt", out / "pretrain.pt") if path.exists()]
        if not found:
            raise UserError(
                f"{out} 里还没有模型；请先运行 python pre_train.py，或用 --checkpoint 指定"
            )
        checkpoint = str(found[0])
    config = Config(device=device, dtype="float32", compile=False)
    return load_for_chat(Path(checkpoint), Device(config))
