"""One page for a run: HTML with everything in it, that needs no JavaScript and nothing from elsewhere."""

import base64
import datetime
import functools
import html
import json
import os
import sys

import tensorflow as tf

from moco_tf import config as configs
from moco_tf.errors import MocoError
from moco_tf.evaluation.encoders import open_encoder
from moco_tf.train import open_data, read_config, versions
from moco_tf.visualize.figures import png
from moco_tf.visualize.show import METRICS, show_curves, show_map, show_neighbours, show_views

NOT_RESULTS = ("config.json", "data.json")
LONGEST = 30    # rows and columns of a table; of longer lists only the length is shown
STYLE = """
:root { color-scheme: light dark; --line: #d8d8d8; --faint: #666; --shade: #f4f4f4; --back: #fff; --ink: #1c1c1c; }
@media (prefers-color-scheme: dark) {
  :root { --line: #444; --faint: #a0a0a0; --shade: #262626; --back: #171717; --ink: #e6e6e6; }
}
body { margin: 0; background: var(--back); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .4rem; }
p { margin: .4rem 0; max-width: 46rem; }
p.faint { color: var(--faint); }
pre { white-space: pre-wrap; background: var(--shade); padding: .75rem 1rem; border-radius: 4px; font-size: .85rem; }
.wide { overflow-x: auto; }
.side { display: flex; flex-wrap: wrap; gap: 0 4rem; }
.side section { max-width: 100%; }
table { border-collapse: collapse; font-size: .88rem; margin: .4rem 0 1rem; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
tbody th { font-weight: 400; color: var(--faint); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; margin: .4rem 0; }
img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); border-radius: 4px; }
"""
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def report(workdir, config):
    """What a run is and what came of it, as the text of an HTML page. A picture that cannot be drawn says why.

    Args:
        workdir: of a run.
        config: whose data section says where the images are.

    Raises:
        UsageError: no run there.
    """
    workdir, run = workdir.rstrip("/"), read_config(workdir)
    encoder = functools.lru_cache(None)(lambda: open_encoder(workdir))
    data = functools.lru_cache(None)(lambda: open_data(config))
    name = os.path.basename(os.path.abspath(workdir))
    folders = sorted(folder.rstrip("/") for folder in tf.io.gfile.listdir(workdir))
    runs = [workdir, *(f"{workdir}/{folder}" for folder in folders
                       if tf.io.gfile.exists(f"{workdir}/{folder}/results.json"))]
    body = [f"<h1>{html.escape(name)}</h1>",
            f'<p class="faint">{html.escape(workdir)}, report of {datetime.datetime.now():%Y-%m-%d %H:%M}</p>',
            "<h2>The run</h2>", *recipe_parts(run),
            details(f"Config: {len(configs.flatten(run))} keys", table(configs.flatten(run).items())),
            "<h2>Results</h2>", *result_parts(workdir, runs),
            "<h2>Curves</h2>"]
    for folder in runs:
        if folder == workdir or any(tf.io.gfile.exists(f"{folder}/{metrics}") for metrics in METRICS):
            body += [f"<h3>{html.escape(os.path.basename(folder))}</h3>"] * (folder != workdir)
            body.append(picture(f"Curves of {os.path.basename(folder)}", lambda: show_curves([folder])))
    body += ["<h2>Views</h2>", picture("Views", lambda: show_views(config))]
    if "encoder" not in run:    # which a probe or a fine-tuning has taken from elsewhere
        body += ["<h2>Nearest neighbours</h2>",
                 picture("Nearest neighbours", lambda: show_neighbours(encoder(), *data())),
                 "<h2>Map of the features</h2>", picture("Map of the features", lambda: show_map(encoder(), *data()))]
    body += ["<h2>Versions of this report</h2>", table(versions().items())]
    return PAGE.format(title=html.escape(name), style=STYLE, body="\n".join(body))


def recipe_parts(run):
    """The nearest recipe's docstring, and where the run's config differs from it."""
    own = configs.flatten(run)
    nearest, recipe = min(((path, configs.flatten(configs.load(name))) for name, path in configs.recipes().items()),
                          key=lambda item: sum(own.get(key) != item[1].get(key) for key in {*own, *item[1]}))
    changed = [(key, recipe.get(key, "none"), own.get(key, "none")) for key in sorted({*own, *recipe})
               if own.get(key) != recipe.get(key)]
    told = f"the nearest; {len(changed)} of {len(own)} keys differ" if changed else "as it is"
    return [f"<p>The recipe <strong>{nearest.stem}</strong>, {told}.</p>",
            f"<pre>{html.escape(configs.describe(nearest))}</pre>",
            *([table(changed, ("key", "in the recipe", "in this run"))] if changed else [])]


def result_parts(workdir, runs):
    """The contents of all JSON files with results, in the workdir and in the folders of runs on its encoder."""
    parts = []
    for folder in runs:
        names = [name for name in tf.io.gfile.listdir(folder) if name.endswith(".json") and name not in NOT_RESULTS]
        for path in (f"{folder}/{name}" for name in sorted(names)):
            try:
                with tf.io.gfile.GFile(path) as file:
                    shown = contents(json.load(file))
            except (ValueError, tf.errors.OpError) as error:
                shown = f'<p class="faint">Cannot be read: {html.escape(str(error))}.</p>'
            parts.append(f"<section><h3>{html.escape(path[len(workdir):].strip('/'))}</h3>{shown}</section>")
    return ['<div class="side">', *parts, "</div>"] if parts else ['<p class="faint">None yet.</p>']


def contents(value):
    """A JSON value as HTML: a table of what is short, then what is long, folded up."""
    if not isinstance(value, dict):
        return listing(value) if isinstance(value, list) else f"<p>{cell(value)}</p>"
    flat = configs.flatten(value)
    names = flat.pop("class_names", None)
    long = {key: item for key, item in flat.items()
            if isinstance(item, list) and (len(item) > 8 or any(isinstance(one, (dict, list)) for one in item))}
    return table((key, item) for key, item in flat.items() if key not in long) + "".join(
        details(f"{html.escape(key)}: {len(item)}", listing(item, names)) for key, item in long.items())


def listing(items, names=None):
    """A list of records, of rows or of values as a table; `names` of its elements, where there are as many."""
    if len(items) > LONGEST or any(isinstance(item, list) and len(item) > LONGEST for item in items):
        return '<p class="faint">More than a page shows; it is in the file.</p>'
    if all(isinstance(item, dict) for item in items):
        keys = list(dict.fromkeys(key for item in items for key in item))
        return table(([item.get(key) for key in keys] for item in items), keys)
    titles = names if names and len(names) == len(items) else range(len(items))
    if all(isinstance(item, list) for item in items):
        return table(([title, *item] for title, item in zip(titles, items)),
                     ("", *titles) if all(len(item) == len(items) for item in items) else ())
    return table(zip(titles, items))


def table(rows, header=()):
    """Cells as HTML; a column of nothing but numbers stands at the right."""
    rows = [list(row) for row in rows]
    right = [i > 0 and all(is_number(value) for value in column) for i, column in enumerate(zip(*rows))]
    look = [' class="number"' if of_numbers else "" for of_numbers in right]
    head = "".join(f"<th{style}>{html.escape(str(title))}</th>" for style, title in zip(look, header))
    tags = ["th", *["td"] * len(right)]
    lines = ["".join(f"<{tag}{style}>{cell(value)}</{tag}>" for tag, style, value in zip(tags, look, row))
             for row in rows]
    return (f'<div class="wide"><table>{f"<thead><tr>{head}</tr></thead>" if head else ""}<tbody>'
            + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</tbody></table></div>")


def cell(value):
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(cell, value)) or "none"
    return "none" if value in (None, "") else html.escape(str(value))


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def details(title, inside):
    return f"<details><summary>{title}</summary>{inside}</details>"


def picture(title, draw):
    """A figure as an image inside the page, or the reason why there is none."""
    print(f"report: {title}", file=sys.stderr, flush=True)
    try:
        content = base64.b64encode(png(draw())).decode()
    except MocoError as error:
        return f'<p class="faint">Not drawn. {html.escape(" ".join(str(error).split()))}</p>'
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{content}">'
