"""What can go wrong that a user can mend: one base, caught once by the command line. The message says what to do."""


class ZsadError(ValueError):
    """The base of all; `zsad` prints its message as one line and exits with code 2."""


class DataError(ZsadError):
    """A data set, image, mask, caption file or the manifest cannot be used."""


class ModelError(ZsadError):
    """A network cannot be loaded, converted or used."""


class MethodError(ZsadError):
    """A method was asked for by a wrong name, with an option that it lacks, or with a value that cannot work."""


class RunError(ZsadError):
    """A run or a file of measurements is not complete, damaged, of something else, or in use by another process."""


class TrainingError(ZsadError):
    """A recipe that does not exist, an option that it lacks, or a work folder of another run."""


class UndefinedMetric(ZsadError):
    """The metric has no value for these inputs; the text says why (one class only, NaN scores, ...)."""
