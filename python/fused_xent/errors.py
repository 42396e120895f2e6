"""What can go wrong."""


class CaptureError(RuntimeError):
    """A capture is not what it should be. Training is not affected: nothing is raised from inside a step."""
