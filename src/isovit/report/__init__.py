"""One look for all reports: self-contained pages, with plots.

The plots are SVG made here and not matplotlib's, because a report must come from a base install,
each of three kinds of plot takes a page of code, and text, hover and widths then follow the page.
"""
