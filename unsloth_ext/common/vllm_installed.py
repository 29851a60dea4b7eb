"""Whether vLLM can be used, before anything is loaded."""

from patches.versions import TESTED, installed_version, require_tested


def require_vllm(asked: str) -> None:
    """Check that vLLM is installed in a tested version.

    Args:
        asked: the setting that needs vLLM, for the message.

    Raises:
        ImportError: it is not.
    """
    if installed_version("vllm") is None:
        raise ImportError(f"{asked}: vLLM is not installed. Run: pip install 'vllm{TESTED['vllm']}', or leave it out")
    require_tested("vllm")
