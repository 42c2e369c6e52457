"""各个测试共用的零件：分词器，以及整场测试只准备一次的内置语料。"""

import pytest
from hypothesis import settings
from scripts import QUICK, STEPS, run

from config import Config
from dataset import TokenFile, prepare
from tokenizer import Tokenizer

settings.register_profile("mini-llm", deadline=None, derandomize=True, database=None)
settings.register_profile("thorough", deadline=None, max_examples=2000, database=None)
settings.load_profile("mini-llm")  # 机器忙时慢一点不算错；同样的代码每次试同样的例子


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """仓库自带的分词器。"""
    return Tokenizer()


@pytest.fixture(scope="session")
def builtin_config(tmp_path_factory) -> Config:
    """数据写在临时目录里的配置；再用它 prepare 内置语料时，会沿用已经写好的。"""
    return Config(data_dir=str(tmp_path_factory.mktemp("builtin")))


@pytest.fixture(scope="session")
def builtin_pretrain(tokenizer, builtin_config) -> TokenFile:
    """内置语料的预训练词元文件：全部三万余条。"""
    return prepare("builtin", "pretrain", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def builtin_sft(tokenizer, builtin_config) -> TokenFile:
    """内置语料的微调词元文件：全部近十万段对话。"""
    return prepare("builtin", "sft", tokenizer, builtin_config)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, builtin_config, builtin_pretrain, builtin_sft):
    """预训练八步，再微调四步，都用内置语料；返回工作目录与两份输出。"""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "data").symlink_to(builtin_config.data_dir)
    outputs = [run(folder, script, "--max_steps", str(n), *QUICK)[0] for script, n in STEPS.items()]
    return folder, *outputs
