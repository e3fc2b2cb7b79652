"""The devices: how fast each computes, when it is there, and what it is busy with.

Models (`speed`, `slowdown`, `availability`, `energy`) are what a scenario says; `make_fleet` makes
the `DeviceFleet` of a run from them. A registered device costs a row of a few arrays; what a random
model draws for it is drawn when it is asked for, the same whatever was asked before.
"""

from fedsim.devices.availability import (
    Always,
    Availability,
    DayNight,
    Intervals,
    OnOffAvailability,
    TraceAvailability,
)
from fedsim.devices.energy import EnergyCosts, EnergyMeter, energy_joules
from fedsim.devices.fleet import DeviceFleet, Job, make_fleet
from fedsim.devices.slowdown import (
    NoSlowdown,
    RandomSlowdown,
    ScheduledSlowdown,
    SlowdownModel,
    SlowPeriods,
)
from fedsim.devices.speed import (
    ClassSpeed,
    ConstantSpeed,
    DeviceClass,
    LognormalSpeed,
    SpeedModel,
    Speeds,
    SpeedTraces,
    TraceSpeed,
    UniformSpeed,
)
from fedsim.devices.timetables import CyclicTimetable, MarkovTimetable, Timetable
from fedsim.devices.traces import StepTrace

__all__ = [
    "Always",
    "Availability",
    "ClassSpeed",
    "ConstantSpeed",
    "CyclicTimetable",
    "DayNight",
    "DeviceClass",
    "DeviceFleet",
    "EnergyCosts",
    "EnergyMeter",
    "Intervals",
    "Job",
    "LognormalSpeed",
    "MarkovTimetable",
    "NoSlowdown",
    "OnOffAvailability",
    "RandomSlowdown",
    "ScheduledSlowdown",
    "SlowPeriods",
    "SlowdownModel",
    "SpeedModel",
    "SpeedTraces",
    "Speeds",
    "StepTrace",
    "Timetable",
    "TraceAvailability",
    "TraceSpeed",
    "UniformSpeed",
    "energy_joules",
    "make_fleet",
]
