"""Encoded bytes of an image file → (H, W, C) uint8, in the graph, by what the bytes are and not by the file's name."""

import tensorflow as tf


def decode_image(encoded, channels=3):
    """Decodes JPEG (grey, RGB, CMYK, YCCK), PNG (1 to 16 bits, grey, palette, alpha), BMP and GIF (the first frame).

    As RGB: alpha is dropped, grey is repeated. 16 bits are cut to the upper 8. Of BMP, 8 (palette), 24 and 32 bits a
    pixel.

    Args:
        encoded: () string, the whole content of a file.
        channels: 3: RGB, from whatever it is. Another number: of a PNG that has so many, as they are: 1 (grey), 2 (grey
            and alpha) or 4 (RGB and alpha, where a fourth measurement such as depth can stand).

    Returns:
        (H, W, channels) uint8.

    Raises:
        tf.errors.InvalidArgumentError: when the bytes are cut off, or are no such image.
    """
    if channels != 3:
        return decode_usual(encoded, channels)
    image = tf.cond(
        tf.io.is_jpeg(encoded),
        lambda: decode_usual(encoded),
        lambda: tf.cond(
            is_bmp(encoded),
            lambda: decode_bmp(encoded),
            lambda: tf.io.decode_image(encoded, channels=3, expand_animations=False)))
    return tf.ensure_shape(image, (None, None, 3))


def decode_usual(encoded, channels=3):
    """As `decode_image`, in a single operation, of JPEG and PNG; it raises for BMP and animated GIF."""
    if channels != 3:
        return tf.ensure_shape(tf.io.decode_png(encoded), (None, None, channels))
    # libjpeg's exact integer transform, the one Pillow uses: TensorFlow's default is the fast, less exact one.
    return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")


def decode_bmp(encoded):
    """() string → (H, W, 3) uint8. `tf.io.decode_bmp` takes palette indices for grey; here they are looked up."""
    pixels = tf.io.decode_bmp(encoded)    # (H, W, 1, 3 or 4)
    return tf.cond(
        tf.equal(tf.shape(pixels)[-1], 1),
        lambda: tf.gather(bmp_palette(encoded), tf.cast(pixels[..., 0], tf.int32)),
        lambda: pixels[..., :3])


def bmp_palette(encoded):
    """(colours, 3) uint8, RGB, from the bytes (B, G, R, 0) between the headers and the pixels of a BMP."""
    pixels_at, header_size = tf.unstack(tf.io.decode_raw(tf.strings.substr(encoded, 10, 8), tf.int32, fixed_length=8))
    palette_at = 14 + header_size
    palette = tf.io.decode_raw(tf.strings.substr(encoded, palette_at, pixels_at - palette_at), tf.uint8)
    return tf.reshape(palette, (-1, 4))[:, 2::-1]


def is_bmp(encoded):
    return tf.strings.regex_full_match(tf.strings.substr(encoded, 0, 2), "BM")


def to_rgb(image):
    """(H, W), (H, W, 1), (H, W, 3) or (H, W, 4) uint8 → (H, W, 3): grey is repeated, alpha dropped."""
    if image.shape.rank == 2:
        image = image[..., None]
    return tf.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
