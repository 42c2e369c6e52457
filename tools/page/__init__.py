"""带得走的网页：一个 HTML 文件里有模型、分词器、推理的程序与脸。

__main__        命令行：读检查点，做成网页
build           各样东西拼成一张网页，写在上面的话，内容安全策略
pack            参数 -> 字节：矩阵存成 int8
tokens          分词器 -> 网页里的分词器要的表

engine.js       模型，用 JavaScript 再写一遍：零件的名字与 model.py 的相同，从下往上读
tokenizer.js    分词器；sampling.js 采样；microscope.js 显微镜与手
worker.js       模型住在自己的线程里
face.js         脸：说话；inside.js 是点开一个词元之后；page.html 与 style.css 是它们的样子，
                怎样画在 tools/explain/draw.js 里
"""
