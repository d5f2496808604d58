"""In a notebook: `dataset.patchsweep`, its figures and its report."""
