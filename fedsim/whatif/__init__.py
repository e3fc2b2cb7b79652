"""What-if studies of topologies and collectives, without training; pictures of topologies."""

from fedsim.whatif.answers import study_table
from fedsim.whatif.drawing import draw_topology
from fedsim.whatif.evaluate import COLUMNS
from fedsim.whatif.fluid import time_schedule
from fedsim.whatif.run import StudyResult, evaluate_study, run_study, write_study
from fedsim.whatif.study import Study, build_topology, read_study

__all__ = [
    "COLUMNS",
    "Study",
    "StudyResult",
    "build_topology",
    "draw_topology",
    "evaluate_study",
    "read_study",
    "run_study",
    "study_table",
    "time_schedule",
    "write_study",
]
