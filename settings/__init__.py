"""设置从哪里来：命令行、config.py、预设，还是自动判断。

flags      命令行 -> 一个 dataclass；--help；脚本的错误怎样说
defaults   取决于别的设置的默认值，连同说给 --help 的那一句
check      值对不对，值与值之间相不相容：一张表
resolve    每个值最后是多少，从哪里来
stored     从检查点开始、接着练时，哪些听检查点的
places     检查点里记着的路径，在项目之外的先问
new_file   写文件：不顺着链接写到别处
"""
