"""stub"""


def add_arguments(c):
    pass


def main(a):
    return 0
