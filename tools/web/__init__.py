"""本地的网页：聊天、显微镜、一步一步地写、比较两个模型、看训练的过程。

    __main__                      命令行：打开网页，一直等到 Ctrl-C
    page                          整个页面：选模型，四个标签页
    chat, step, compare, training 四个标签页，每个一份
    controls                      几个标签页都有的：一句提示、采样的各项
    actions                       每个按钮背后做的事，不认识 Gradio
    lock                          门锁：每个请求先看名字、来处、密码、路、正文
    names, forms, password, crowd 它叫什么；表单里该有什么；密码；谁还在听
    server                        uvicorn，连接有限，等得有限

page、server 与四个标签页，各份都要先装好 Gradio（requirements-web.txt）。
"""
