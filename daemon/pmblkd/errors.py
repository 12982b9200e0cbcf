"""Exception groups, as trio's nurseries raise them."""


def first_leaf(error: BaseException) -> BaseException:
    """The first exception in a group of groups; any other exception as it is."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
