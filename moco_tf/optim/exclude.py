"""Parameters that an optimizer treats apart, chosen by name: the rank of a Keras variable is not always PyTorch's."""

import difflib
import re

from moco_tf.errors import UsageError


def excluded(patterns, variables):
    """Which of `variables` a pattern matches.

    Args:
        patterns: regular expressions, each searched in a variable's name, as `blocks.0/bias`: "bias$", "pos_embed".
        variables: of the model.

    Returns:
        A bool for each variable.

    Raises:
        UsageError: a pattern that matches no variable, or is no regular expression.
    """
    names = [variable.name.split(":")[0] for variable in variables]
    for pattern in patterns:
        try:
            unused = not any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError("optimizer.exclude takes regular expressions, searched in the names of parameters. "
                             f"Received: {pattern!r}: {error}.") from None
        if unused:
            parts = sorted({part for name in names for part in (name, *name.split("/"))})
            kinds = sorted({name.split("/")[-1] for name in names})
            near = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.5) or kinds
            raise UsageError("Each pattern of optimizer.exclude must match the name of a parameter. "
                             f"Received: {pattern!r}, which matches none. Nearest: {', '.join(near)}.")
    return [any(re.search(pattern, name) for pattern in patterns) for name in names]
