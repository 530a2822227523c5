"""Batch normalisation over groups of a fixed number of images, whatever the number of devices, or over all of them."""

import tensorflow as tf

from moco_tf.distribute import mean_over_replicas, update_copies

keras = tf.keras

ALL_REPLICAS = -1    # as group_size: the batches of all replicas are one group


@keras.utils.register_keras_serializable("moco_tf")
class BatchNorm(keras.layers.Layer):
    """Batch normalisation as PyTorch defines it, over groups of `group_size` consecutive images.

    MoCo v1 and v2 train with 32 images per GPU, and each GPU normalises by itself (arXiv:1911.05722, sec. 3.3). Here
    the group, not the device, is that unit: one device with 256 images has eight groups, eight devices with 32 have
    one each. MoCo v3 synchronises instead (arXiv:2104.02057 and its code): one group over all replicas.

    With `training=True` every group is normalised by its own mean and biased variance, and the moving statistics move
    towards the mean over the groups of mean and *unbiased* variance; a channel whose batch statistics are not finite
    leaves them as they are. Otherwise the moving statistics normalise. `trainable` has no say in this: a momentum
    encoder is frozen, and still normalises by its batch.

    Inputs are (B, C) or (B, H, W, C), C static, and so is B when `group_size` is set. The statistics are at least
    float32; outputs have the dtype of the inputs.

    Args:
        group_size: images that share statistics, a divisor of the batch that one replica gets; None: all of that batch;
            ALL_REPLICAS: the batches of all replicas, for which a pass has one collective, of 2 C numbers.
        momentum: weight of the old value in the moving statistics (PyTorch's `momentum` is 1 minus this).
        epsilon: added to the variance.
        center, scale: whether there are `beta`, added, and `gamma`, multiplied, both (C,).
        gamma_initializer: of `gamma`.

    Raises:
        ValueError: while tracing, for a batch that `group_size` does not divide.
    """

    def __init__(self, group_size=None, momentum=0.9, epsilon=1e-5, center=True, scale=True,
                 gamma_initializer="ones", **kwargs):
        super().__init__(**kwargs)
        self.group_size, self.momentum, self.epsilon = group_size, momentum, epsilon
        self.center, self.scale = center, scale
        self.gamma_initializer = keras.initializers.get(gamma_initializer)

    def build(self, input_shape):
        if len(input_shape) not in (2, 4) or input_shape[-1] is None:
            raise ValueError(
                "BatchNorm takes (B, C) or (B, H, W, C) with the number of channels known. "
                f"Received: an input of shape {tuple(input_shape)}.")
        common = dict(shape=(input_shape[-1],), dtype=_at_least_float32(self.dtype), experimental_autocast=False)
        # Written in every replica, so averaged at once: replicas hold equal values, and so does a checkpoint.
        moving = dict(common, trainable=False, synchronization=tf.VariableSynchronization.AUTO,
                      aggregation=tf.VariableAggregation.MEAN)
        self.gamma = self.add_weight(name="gamma", initializer=self.gamma_initializer, **common) if self.scale else None
        self.beta = self.add_weight(name="beta", initializer="zeros", **common) if self.center else None
        self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", **moving)
        self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", **moving)
        super().build(input_shape)

    def call(self, inputs, training=None):
        mean, variance = tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)
        gamma = tf.ones_like(mean) if self.gamma is None else tf.convert_to_tensor(self.gamma)
        beta = tf.zeros_like(mean) if self.beta is None else tf.convert_to_tensor(self.beta)
        fused = inputs.shape.rank == 4 and mean.dtype == tf.float32
        if not training:
            if fused:
                return tf.compat.v1.nn.fused_batch_norm(
                    inputs, gamma, beta, mean, variance, self.epsilon, is_training=False)[0]
            return _normalize(tf.cast(inputs, mean.dtype), gamma, beta, mean, variance, self.epsilon, inputs.dtype)

        if self.group_size == ALL_REPLICAS and tf.distribute.get_strategy().num_replicas_in_sync > 1:
            outputs, batch_mean, batch_variance = _train_synchronised(inputs, gamma, beta, mean, self.epsilon)
            # Equal on all replicas as they are.
            update_copies(lambda moving, step: moving.assign_add(step), *self._moves(batch_mean, batch_variance))
            return outputs

        train = _train_fused if fused else _train
        parts = [train(part, gamma, beta, self.epsilon) for part in self._groups(inputs)]
        outputs, means, variances = zip(*parts)
        for moving, step in zip(*self._moves(tf.add_n(means) / len(parts), tf.add_n(variances) / len(parts))):
            moving.assign_add(step)
        return tf.concat(outputs, axis=0)

    def get_config(self):
        return dict(super().get_config(), group_size=self.group_size, momentum=self.momentum, epsilon=self.epsilon,
                    center=self.center, scale=self.scale,
                    gamma_initializer=keras.initializers.serialize(self.gamma_initializer))

    def _groups(self, inputs):
        batch = inputs.shape[0]
        if self.group_size in (None, ALL_REPLICAS, batch):
            return [inputs]
        if batch is None or batch % self.group_size:
            raise ValueError(
                "The batch of each replica must be a multiple of the BatchNorm group, which normalises by itself. "
                f"Received: {'a batch of unknown size' if batch is None else f'{batch} images per replica'}, "
                f"groups of {self.group_size}. Set bn_group_size to a divisor of batch_size / replicas, "
                "or to None for one group per replica; batch with drop_remainder=True.")
        # A fused kernel for each part beats one set of plain operations on a (groups, size, H, W, C) tensor by 1.5.
        return tf.split(inputs, batch // self.group_size)

    def _moves(self, mean, variance):
        """The moving statistics, and what to add to each of them."""
        finite = tf.math.is_finite(mean) & tf.math.is_finite(variance)
        moving = [self.moving_mean, self.moving_variance]
        steps = [(1.0 - self.momentum) * (value - old) for old, value in zip(moving, (mean, variance))]
        return moving, [tf.where(finite, step, tf.zeros_like(step)) for step in steps]


def _at_least_float32(dtype):
    return tf.float32 if tf.as_dtype(dtype).size < 4 else tf.as_dtype(dtype)


def _train_fused(inputs, gamma, beta, epsilon):
    # The third result of this kernel is the unbiased variance, though it normalises by the biased one.
    return tf.compat.v1.nn.fused_batch_norm(inputs, gamma, beta, epsilon=epsilon, is_training=True)


def _train(inputs, gamma, beta, epsilon):
    x = tf.cast(inputs, gamma.dtype)
    mean, variance = _moments(x)
    outputs = _normalize(x, gamma, beta, mean, variance, epsilon, inputs.dtype)
    return outputs, mean, _unbiased(variance, x)


def _train_synchronised(inputs, gamma, beta, moving_mean, epsilon):
    x = tf.cast(inputs, gamma.dtype)
    mean, variance = _moments(x)
    # Relative to the moving mean, which all replicas know: a variance from the means of plain values and squares would
    # be lost to rounding where the mean is large.
    offset = mean - moving_mean
    offset, square = tf.unstack(mean_over_replicas(tf.stack([offset, variance + tf.square(offset)])))
    mean, variance = moving_mean + offset, tf.maximum(square - tf.square(offset), 0.0)
    outputs = _normalize(x, gamma, beta, mean, variance, epsilon, inputs.dtype)
    return outputs, mean, _unbiased(variance, x, replicas=tf.distribute.get_strategy().num_replicas_in_sync)


def _moments(x):
    return tf.nn.moments(x, list(range(x.shape.rank - 1)))


def _unbiased(variance, x, replicas=1):
    values = tf.cast(replicas * (tf.size(x) // x.shape[-1]), x.dtype)
    return variance * values / tf.maximum(values - 1, 1)


def _normalize(x, gamma, beta, mean, variance, epsilon, dtype):
    return tf.cast((x - mean) * (tf.math.rsqrt(variance + epsilon) * gamma) + beta, dtype)
