from tests.model.conftest import process_group

__all__ = ["process_group"]
