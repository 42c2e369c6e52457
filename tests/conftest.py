"""各个测试共用的零件：分词器，以及整场测试只准备一次的内置语料。"""

import os
from pathlib import Path

# 几个进程挤在两个核上时，每个一个线程才快；要在导入 torch 之前说（下面各行都会导入它）。
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from scripts import QUICK, STEPS, run

from config import Config
from corpus.token_file import TokenFile, tokenize_corpus
from tokenizer import Tokenizer

settings.register_profile("mini-llm", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=2000, database=None)
settings.load_profile("mini-llm")  # 机器忙时慢一点不算错；同样的代码每次试同样的例子


def pytest_collection_modifyitems(items) -> None:
    """标着 gpu 的测试，没有 NVIDIA 显卡就跳过。"""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="需要 NVIDIA 显卡"))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """仓库自带的分词器。"""
    return Tokenizer()


@pytest.fixture(scope="session")
def common(tmp_path_factory) -> Path:
    """这一次测试的几个进程（pytest-xdist）共用的目录。"""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def builtin_config(common) -> Config:
    """数据写在临时目录里的配置；再用它 prepare 内置语料时，会沿用已经写好的。"""
    return Config(data_dir=str(common / "builtin"))


@pytest.fixture(scope="session")
def builtin_pretrain(tokenizer, builtin_config) -> TokenFile:
    """内置语料的预训练词元文件：全部三万余条。"""
    return tokenize_corpus("builtin", "pretrain", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def builtin_sft(tokenizer, builtin_config) -> TokenFile:
    """内置语料的微调词元文件：全部近十万段对话。"""
    return tokenize_corpus("builtin", "sft", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def trained(common, builtin_config, builtin_pretrain, builtin_sft):
    """预训练十六步，再微调十步，都用内置语料；返回工作目录与两份输出。几个进程只做一次。"""
    folder = common / "reader"
    with FileLock(common / "reader.lock"):
        if not folder.exists():
            folder.mkdir()
            (folder / "data").symlink_to(builtin_config.data_dir)
            for script, n in STEPS.items():
                text, _ = run(folder, script, "--max_steps", str(n), *QUICK)
                (folder / f"{script}.txt").write_text(text, encoding="utf-8")
    return folder, *((folder / f"{script}.txt").read_text(encoding="utf-8") for script in STEPS)
