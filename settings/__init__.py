"""设置从哪里来：命令行、config.py、预设，还是自动判断。

script     一个程序从头到尾，出了什么事都只说一句
say        说给人看的话都从这里出去，控制不了终端
flags      命令行 -> 一个 dataclass；--help
defaults   取决于别的设置的默认值，连同说给 --help 的那一句
check      值对不对，值与值之间相不相容：一张表
resolve    每个值最后是多少，从哪里来
stored     从检查点开始、接着练时，哪些听检查点的
"""
