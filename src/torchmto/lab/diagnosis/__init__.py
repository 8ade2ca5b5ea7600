"""What a problem's gradients are like, and which methods suit: measuring (`probe`) and judging (`advise`) apart.

Needs torch and the core of torchmto only, so any model and closure can be probed, not just the lab's.
"""

from torchmto.lab.diagnosis.advice import Diagnosis, Finding, Plan, Suggestion, Thresholds, advise
from torchmto.lab.diagnosis.measurements import Layer, Margins, Measurements, relative_margins
from torchmto.lab.diagnosis.probe import probe, probe_priorities

__all__ = [
    "Diagnosis",
    "Finding",
    "Layer",
    "Margins",
    "Measurements",
    "Plan",
    "Suggestion",
    "Thresholds",
    "advise",
    "probe",
    "probe_priorities",
    "relative_margins",
]
