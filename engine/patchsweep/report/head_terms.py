"""Texts of the page of heads on ablations and head classes."""

# ablation -> the value that replaces z
ABLATIONS = {
    "resample": "its z on the corrupted prompt",
    "mean": "its mean z over all positions of all clean prompts",
    "mean_label": "its mean z over the positions with the same label",
    "zero": "zeros",
    "optimal": "the constant that changes the predictions least",
}
# class -> the behaviour of its heads
CLASSES = {
    "induction": "after a repeated word, looks at what came after it the first time",
    "previous_token": "looks at the token before",
    "duplicate_token": "looks at the same word earlier on",
    "name_mover": "looks at IO from the end, and writes directly in favour of its name",
    "negative": "looks at IO from the end, and writes directly against its name",
    "s_inhibition": "looks at S2 from the end, and works through the queries of name movers",
    "backup": "writes directly for the name only when the name movers are held at their means",
    "other": "none of these",
}
# class -> the thresholds of its rule
RULES = {
    "induction": ("induction",),
    "previous_token": ("previous_token",),
    "duplicate_token": ("duplicate_token",),
    "name_mover": ("attention", "direct"),
    "negative": ("attention", "direct"),
    "s_inhibition": ("attention", "queries"),
    "backup": ("direct", "rise"),
}


def class_name(head_class: str) -> str:
    """Return the displayed name, such as "S-inhibition" for `s_inhibition`."""
    names = {"s_inhibition": "S-inhibition", "negative": "negative name mover"}
    return names.get(head_class, head_class.replace("_", " "))
