"""Print the file of `modeling_gated.conversion`, and the module of its error."""

from modeling_gated import conversion


print(conversion.__file__, conversion.ConversionError.__module__)
