"""TODO"""

from settings.flags import run_script
from tools.huggingface.export import main

if __name__ == "__main__":
    run_script(main)
