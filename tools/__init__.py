"""带在身边的工具，一个文件夹一样；不用它们也能训练和聊天。

python -m tools.inspect 文件        数据体检，不训练           inspect/
python -m tools.explain "文字"      看进模型里去               explain/
python -m tools.web                 本地的网页                 web/
python -m tools.page 检查点 网页    带得走的一个文件           page/
python -m tools.draw 图名           课里的九张图               draw/
python -m tools.bench               测速                       bench/
python -m tools.lab.try_residual    实验，共七个               lab/
python -m tools.export、import_hf   与 Hugging Face 往来       huggingface/
"""
