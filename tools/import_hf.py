"""TODO"""

from settings.flags import run_script
from tools.huggingface.import_hf import main

if __name__ == "__main__":
    run_script(main)
