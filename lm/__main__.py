"""`python -m lm VERB ...`"""

from lm.main import lm_main

if __name__ == "__main__":
    lm_main()
