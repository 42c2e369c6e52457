"""各个测试共用的零件：分词器，以及整场测试只准备一次的内置语料、只训练一次的模型。

pytest 的主进程也读这个文件，自己却不跑测试：torch 等用到才导入，两个干活的进程便早一点开始。
"""

import os
from pathlib import Path

# 几个进程挤在两个核上时，每个一个线程才快；单独运行一个测试时也一样，结果才与它们的相同。
os.environ["OMP_NUM_THREADS"] = "1"  # 要在导入 torch 之前

import pytest
from filelock import FileLock
from hypothesis import settings

settings.register_profile("mini-llm", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=2000, database=None)
settings.load_profile("mini-llm")  # 机器忙时慢一点不算错；同样的代码每次试同样的例子

DOORS = {"test_align.py", "test_lora.py", "test_serve.py"}  # 整份都要 examples 各自的包
# 久的几份在前，短的垫后，两个进程才差不多同时做完；开头的两份，只有一份要语料与训练好的模型。
LONG = ["test_download.py", "test_resume.py", "test_export.py", "test_web.py", "test_bench.py",
        "test_evaluate.py", "test_laboratory.py", "test_experts.py", "test_distributed.py",
        "test_distill.py", "test_end_to_end.py", "test_checkpoint.py"]  # fmt: skip


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """不跑 doors 时，整份都是的不必读：只导入它们要的包就要好几秒。"""
    if collection_path.name in DOORS and "not doors" in config.option.markexpr:
        return True
    return None


def pytest_collection_modifyitems(items) -> None:
    """久的在前；标着 gpu 的测试，没有 NVIDIA 显卡就跳过。"""
    places = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="需要 NVIDIA 显卡"))


@pytest.fixture(scope="session")
def tokenizer():
    """仓库自带的分词器。"""
    from tokenizer import Tokenizer

    return Tokenizer()


@pytest.fixture(scope="module")
def browser():
    """没有窗口的 chromium；没有装，就略过。"""
    from chromium import CHROMIUM, QUIET

    if CHROMIUM is None:
        pytest.skip("没有 chromium：apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="没有安装 playwright")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
    """这一次测试的几个进程（pytest-xdist）共用的目录。"""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def builtin_config(common):
    """数据写在临时目录里的配置；再用它 prepare 内置语料时，会沿用已经写好的。"""
    from config import Config

    return Config(data_dir=str(common / "builtin"))


@pytest.fixture(scope="session")
def builtin_pretrain(tokenizer, builtin_config):
    """内置语料的预训练词元文件：全部三万余条。"""
    from corpus.token_file import tokenize_corpus

    return tokenize_corpus("builtin", "pretrain", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def builtin_sft(tokenizer, builtin_config):
    """内置语料的微调词元文件：全部近十万段对话。"""
    from corpus.token_file import tokenize_corpus

    return tokenize_corpus("builtin", "sft", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def trained(common, builtin_config, builtin_pretrain, builtin_sft) -> tuple[Path, str, str]:
    """tiny，预训练十六步，再微调十步，都用内置语料；返回工作目录与两份输出。"""
    from scripts import STEPS

    return trained_once(common / "reader", builtin_config.data_dir, STEPS, [])


@pytest.fixture(scope="session")
def little(common, builtin_config, builtin_pretrain, builtin_sft) -> Path:
    """同样，但模型再小几倍；返回工作目录。"""
    from scripts import LITTLE, LITTLE_STEPS

    return trained_once(common / "little", builtin_config.data_dir, LITTLE_STEPS, LITTLE)[0]


def trained_once(folder: Path, data: str, steps: dict, shape: list) -> tuple[Path, str, str]:
    """预训练，再微调；几个进程（pytest-xdist）只做一次，先来的做。"""
    from scripts import QUICK, run

    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(data)
            for script, n in steps.items():
                text, _ = run(folder, script, "--max_steps", str(n), *QUICK, *shape)
                (folder / f"{script}.txt").write_text(text, encoding="utf-8")
    return folder, *((folder / f"{script}.txt").read_text(encoding="utf-8") for script in steps)
