"""fastlip's attacks behind the interfaces of other libraries.

This package imports none of its modules. ``fastlip.integrations.torchattacks``, ``.foolbox`` and ``.art`` need the
package that they are named after; ``.autoattack``, ``.attackbench`` and ``.robustbench`` need no other package.
"""
