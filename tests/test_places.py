"""检查点里记着的路径在项目之外的，先问；写文件不顺着别人放好的链接写到别处。"""

import json
import os
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from invented import documents_like
from scripts import LITTLE, QUICK, REPO, run
from test_checkpoint import SMALL, snapshot

from config import Config, UserError
from engine import corpora
from engine.checkpoint import read, write
from engine.distributed import World
from engine.run_folder import RunFolder
from settings.files import new_file, write_text
from settings.places import outside
from settings.resolve import Origin, load_config, save_config
from settings.stored import inherit
from tools.draw.of_model import count_losses

# ---------- 1. 不顺着链接写 ----------


@pytest.fixture(params=["符号链接", "硬链接"])
def trap(request, tmp_path):
    """放一个链接的函数；结束时，它指着的文件应当没有变。"""
    precious = tmp_path / "precious"
    precious.write_text("要紧的", encoding="utf-8")

    def lay(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if request.param == "硬链接":
            os.link(precious, path)
        else:
            path.symlink_to(precious)

    yield lay
    assert precious.read_text(encoding="utf-8") == "要紧的"


def test_a_link_at_the_place_of_the_temporary_file_is_not_followed(trap, tmp_path, tokenizer):
    path = tmp_path / "out/pretrain.pt"
    trap(path.with_name("pretrain.pt.part"))
    for step in (1, 2):
        write(path, snapshot(tokenizer, step=step))
        assert read(path)["progress"]["step"] == step and not path.is_symlink()
        assert [p.name for p in path.parent.glob("*.part")] == []
        trap(path.with_name("pretrain.pt.part"))


def test_records_and_locks_do_not_follow_links_either(trap, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("config.json", "config.json.part"):
        trap(Path("out/x/pretrain", name))
        save_config(SMALL, Path("out/x/pretrain/config.json"))
    config, origins = load_config("pretrain", ["--out_dir", "out/x"])
    folder = RunFolder("pretrain", config, origins, World())
    trap(Path("out/x/.pretrain.launch"))
    folder.settle(fresh=True)
    folder.close()
    Path("out/x/.lock").unlink(missing_ok=True)
    trap(Path("out/x/.lock"))
    with pytest.raises(UserError, match=r"out/x/\.lock 是链接，不是训练的锁"):
        RunFolder("pretrain", config, origins, World())


def test_new_files_replace_the_name_and_refuse_a_folder(tmp_path):
    path = tmp_path / "a"
    os.mkfifo(path)  # 照普通的写法，打开它会一直等下去
    write_text(path, "一")
    with new_file(path, "w", encoding="utf-8") as file:
        file.write("二")
    assert path.read_text(encoding="utf-8") == "二"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        new_file(tmp_path / "folder")


# ---------- 2. 项目之外的路径 ----------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("builtin", False), ("auto", False), (None, False), ("data", False), ("my.jsonl", False),
        (str(REPO / "data/a.json"), False), ("/etc/passwd", True), ("../x.txt", True),
        ("data/../../x", True), ("a.txt,/etc/passwd", True), ("a.txt, b.txt", False),
        ("data/*/../../../etc/*", True), ("/etc/*", True), ("here/..", True), ("linked/../x", True),
        ("*/../" * 20 + "*", True), ("a..b/..c", False), ("a, here/.. ", True), ("/", True),
        (str(REPO) + "-other/x", True), ("a, ../b", True), ("linked/x.txt", False),
    ],
)  # fmt: skip
def test_what_lies_outside(value, expected, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to("/usr")  # data/ 可以是一个链接，指着另一块大的磁盘
    monkeypatch.chdir(tmp_path)
    assert outside(value) is expected


@pytest.fixture
def resume(tmp_path, monkeypatch, tokenizer):
    """接着练一个检查点，它的 config 另有改动；返回 (配置, 怎样再接着练)。"""
    monkeypatch.chdir(tmp_path)

    def begin(changes: dict, *flags: str, stage="pretrain", edited: Config | None = None):
        snap = snapshot(tokenizer, replace(SMALL, **changes), stage)
        write(Path(f"out/x/{stage}.pt"), snap)
        argv = ["--resume", "--out_dir", "out/x", *flags]
        config, origins = load_config(stage, argv, edited)
        folder = RunFolder(stage, config, origins, World())
        try:
            folder.begin(config, origins, tokenizer)
        finally:
            folder.close()
        return config, folder.how_to_resume

    return begin


@pytest.mark.parametrize(
    ("stage", "changes", "flag"),
    [
        ("pretrain", {"data": "/etc/passwd"}, "--data /etc/passwd"),
        ("pretrain", {"data_dir": "/tmp/not mine"}, "--data_dir '/tmp/not mine'"),
        ("pretrain", {"data": "a.txt,/etc/hosts"}, "--data a.txt,/etc/hosts"),
        ("pretrain", {"replay_data": "../old.txt", "replay": 0.1}, "--replay_data ../old.txt"),
        ("sft", {"sft_data": "/etc/passwd"}, "--sft_data /etc/passwd"),
    ],
)
def test_paths_of_somebody_else_are_asked_for_not_obeyed(resume, stage, changes, flag):
    with pytest.raises(UserError) as caught:
        resume(changes, stage=stage)
    said = str(caught.value)
    script = {"pretrain": "pre_train.py", "sft": "sft_train.py"}[stage]
    command = f"python {script} --out_dir out/x --resume {flag}"
    assert said.endswith(f"请写明：{command}") and "没有照办" in said and "\n" not in said
    config, again = resume(changes, *shlex.split(flag), stage=stage)  # 写明了，就是答应
    assert again == command  # 以后印出来的命令也带着它，照抄就行
    assert all(getattr(config, name) == value for name, value in changes.items())


def test_paths_inside_or_ones_own_are_obeyed(resume, tmp_path):
    for path in ("my.jsonl", str(tmp_path / "my.jsonl"), str(REPO / "data/x.json"), "builtin"):
        config, again = resume({"data": path})
        assert config.data == path and again == "python pre_train.py --out_dir out/x --resume"
    own = Config(data="/big/wiki.json")  # config.py 里就是这样写的
    config, again = resume({"data": "/big/wiki.json"}, edited=own)
    assert config.data == "/big/wiki.json" and again.endswith("--resume --data /big/wiki.json")
    config, _ = resume({"sft_data": "/etc/passwd", "init_from": "/etc/x.pt"})  # 预训练用不到
    config, _ = resume({"data": "/etc/passwd"}, stage="sft")  # 微调也读不到预训练的语料
    config, _ = resume({"replay_data": "/etc/passwd"})  # 只用来检验的：读的时候再说


def test_an_old_corpus_outside_is_left_out_or_asked_for(capsys):
    """增量预训练：起点里记着的旧语料在外面。只用来检验的，说一声，不读；要回放的，问。"""

    def read_old(*flags):
        config, origins = load_config("pretrain", ["--init_from", "x.pt", "--data", "a", *flags])
        inherit(config, origins, replace(SMALL, preset=config.preset, data="/etc/passwd"), "x.pt",
                "pretrain")  # fmt: skip
        asked = []
        run = SimpleNamespace(config=config, origins=origins, checkpoint=None, start_path="x.pt",
                              stage="pretrain", resumed=True, world=World(), waits=False,
                              tokenizer=None)  # fmt: skip
        read = lambda source, *_, **__: asked.append(source) or SimpleNamespace(card={})  # noqa: E731
        corpora.read_old(run, read)
        return origins["replay_data"], asked

    assert read_old("--preset", "tiny") == (Origin.CHECKPOINT, [])
    assert "没有读" in (said := capsys.readouterr().out) and "--replay_data /etc/passwd" in said
    with pytest.raises(UserError, match=r"没有照办.*--replay_data /etc/passwd"):
        read_old("--preset", "tiny", "--replay", "0.1")
    named = ("--preset", "tiny", "--replay_data", "/etc/passwd")
    assert read_old(*named) == (Origin.FLAG, ["/etc/passwd"])


@pytest.mark.parametrize("start", ["pretrain", "sft"])
def test_what_fine_tuning_replays_is_asked_for_too(start):
    """微调：起点里记着的文字或对话在外面，要回放就问；写明了才读。"""

    def read_old(*flags):
        config, origins = load_config("sft", ["--preset", "tiny", "--replay", "0.1", *flags])
        source = replace(SMALL, data="/etc/passwd", sft_data="/etc/shadow")
        inherit(config, origins, source, "x.pt", "sft", start)
        asked = []
        run = SimpleNamespace(config=config, origins=origins, checkpoint=None, start_path="x.pt",
                              stage="sft", resumed=True, world=World(), waits=False,
                              tokenizer=None)  # fmt: skip
        read = lambda *where, **_: asked.append(where[:2]) or SimpleNamespace(card={})  # noqa: E731
        corpora.read_old(run, read)
        return asked

    found = {"pretrain": "/etc/passwd", "sft": "/etc/shadow"}[start]
    with pytest.raises(UserError, match=rf"记着的 replay_data 是 {found}.*--replay_data {found}"):
        read_old()
    assert read_old("--replay_data", found) == [(found, start)]
    assert read_old("--replay_data", "mine.jsonl", "--replay_stage", "pretrain") == [
        ("mine.jsonl", "pretrain")
    ]


def test_pictures_do_not_read_what_a_checkpoint_names_either():
    for changes in ({"data": "/etc/passwd"}, {"data": "builtin", "data_dir": "/etc/x"}):
        with pytest.raises(UserError, match="没有读"):
            count_losses(SimpleNamespace(config=Config(**changes)))


def test_the_command_that_is_printed_works_as_it_is(tmp_path):
    """语料与词元文件都在别处：停下时印的命令照抄就接得上；少写了，退出码 2，什么也没有建。"""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    rows = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents_like(60))
    (there / "my.jsonl").write_text("".join(rows), encoding="utf-8")
    places = ["--data", str(there / "my.jsonl"), "--data_dir", str(there / "cache")]
    run(here, "pre_train.py", "--max_steps", "2", "--val_fraction", "0.2", "--out_dir", "out/x",
        *places, *QUICK, *LITTLE)  # fmt: skip
    more = ["--allow_changes", "--max_steps", "3"]
    _, err = run(here, "pre_train.py", "--resume", "--out_dir", "out/x", *more, code=2)
    command = shlex.split(err.strip().rpartition("请写明：")[2])
    assert command == ["python", "pre_train.py", "--out_dir", "out/x", "--resume", *places]
    assert not (here / "data").exists()
    out, _ = run(here, *command[1:], *more)
    assert "已经走完 2 步，共 3 步" in out
