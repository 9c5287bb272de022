"""The slice worker of scls_router. Start reading at `engine.Engine.step`."""

__version__ = "0.1.0"
