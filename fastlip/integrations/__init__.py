"""fastlip's attacks behind the interfaces of other libraries.

Nothing is imported here: ``fastlip.integrations.torchattacks``, ``.foolbox`` and ``.art`` need the package that they
are named after, ``.autoattack``, ``.attackbench`` and ``.robustbench`` need none.
"""
