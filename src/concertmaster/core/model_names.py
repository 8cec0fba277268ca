"""Models go by many spellings; the fleet, the data and the forecasts must mean the same one."""


def canonical(name: str) -> str:
    """One spelling for one model: no owner, lower case, dots in versions.

    >>> canonical("meta-llama/Meta-Llama-3_1-8B-Instruct")
    'llama-3.1-8b-instruct'
    """
    return name.rsplit("/", 1)[-1].lower().replace("_", ".").removeprefix("meta-")
