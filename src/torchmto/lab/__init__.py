"""The experiment side of torchmto: data sets, models, losses, metrics, trainer and reports.

Everything here needs the extra ``torchmto[lab]``; nothing below this layer imports from it.
"""
