"""Files, local or remote, that are whole or not there."""

import tensorflow as tf


def write_file(path, content):
    """Writes text or bytes under another name first, then renames, so that no reader meets half a file."""
    with tf.io.gfile.GFile(f"{path}.partial", "w") as file:
        file.write(content)
    tf.io.gfile.rename(f"{path}.partial", path, overwrite=True)
