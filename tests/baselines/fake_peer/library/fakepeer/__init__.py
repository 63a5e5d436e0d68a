"""A library that exists in one environment only: it rounds weights, or misbehaves."""

import time

VERSION = "1.0"


def shrink(model, digits):
    for parameter in model.parameters():
        parameter.data = (parameter.data * 10**digits).round() / 10**digits
    return model


def hang():
    time.sleep(100)
