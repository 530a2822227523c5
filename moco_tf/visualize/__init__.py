"""Pictures of data, runs and encoders: files and arrays in, PNG and HTML out. Training never calls it."""

import os

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.errors import UsageError
from moco_tf.evaluation.classifier import complete_config
from moco_tf.evaluation.encoders import open_encoder
from moco_tf.files import write_file
from moco_tf.train import open_data
from moco_tf.visualize.figures import png
from moco_tf.visualize.report import report
from moco_tf.visualize.show import show_curves, show_map, show_neighbours, show_views


def draw(subject, paths, config, out, points=2000, **neighbours):
    """What `moco-tf show` writes.

    Args:
        subject: "views", "curves", "neighbours", "map" or "report".
        paths: workdirs; of "neighbours" and "map" one of what `open_encoder` takes; of "views" none is read.
        config: says which images, and their views; None for curves.
        out: the file to write.
        points: of `show_map`. neighbours: of `show_neighbours`.

    Raises:
        UsageError, DataError: whatever is missing; a file that cannot be written.
    """
    if subject == "views":
        content = png(show_views(config))
    elif subject == "curves":
        content = png(show_curves(paths))
    elif subject == "report":
        content = report(paths[0], config)
    else:
        encoder = open_encoder(paths[0])
        data = open_data(config if config.data.name else complete_config(configs.override(config, encoder=paths[0])))
        content = png(show_map(encoder, *data, points) if subject == "map" else
                      show_neighbours(encoder, *data, **neighbours))
    try:
        tf.io.gfile.makedirs(os.path.dirname(out) or ".")
        write_file(out, content)
    except (tf.errors.OpError, OSError) as error:
        raise UsageError(f"The file must be one that can be written. Received: {out}: "
                         f"{str(getattr(error, 'message', error)).splitlines()[0]}. Name another by --out.") from None
