"""Modes of the command line, one file each: its flags, and `run(command)`.

A mode may say more of itself, by names in its module:

    NEEDS_CONFIG   True: --config must be given
    WORKDIR        'always', 'optional', or 'model' (the default: a workdir, or a config that names
                   a folder in `init_from`)
    SAVES          True: SIGTERM is kept until the run has saved
    ALONE          True: other processes are not joined
    prepare()      called before JAX starts

`run` may return a function, which is called at the end: there a ValueError is a defect, and only a
loss that is not finite or a full disk is a message without a traceback. Modules are imported to
define their flags, so they import what takes long inside `run`.
"""
