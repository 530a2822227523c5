"""python -m moco_tf"""

import sys

from moco_tf.cli import main

if __name__ == "__main__":
    sys.exit(main())
