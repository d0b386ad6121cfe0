"""Messages of the contract as plain JSON, and their JSON Schemas: one description serves gRPC and REST."""

from __future__ import annotations

from typing import Any, Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

_WHOLE: Final = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_UINT32,
    FieldDescriptor.CPPTYPE_UINT64,
}
_BROKEN: Final = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON types: names as in the contract, integers as numbers, enums as their lower-case words.

    What was not given is left out; a list is there, also an empty one, and so is a number or text without presence.
    """
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence:
            if message.HasField(field.name):
                found[field.name] = _value(field, getattr(message, field.name))
        elif _is_map(field):
            found[field.name] = dict(getattr(message, field.name))
        elif field.is_repeated:
            found[field.name] = [_value(field, one) for one in getattr(message, field.name)]
        else:
            found[field.name] = _value(field, getattr(message, field.name))
    return found


def schema(descriptor: Any, known: dict[str, Any]) -> dict[str, str]:
    """A reference to the JSON Schema of what `plain` makes of this type; it and those it needs are put among `known`."""
    if descriptor.name not in known:
        known[descriptor.name] = {}  # a type may hold itself
        properties: dict[str, Any] = {}
        required = []
        for field in descriptor.fields:
            if _is_map(field):
                properties[field.name] = {
                    "type": "object",
                    "additionalProperties": _kind(field.message_type.fields_by_name["value"], known),
                }
            elif field.is_repeated:
                properties[field.name] = {"type": "array", "items": _kind(field, known)}
            else:
                properties[field.name] = _kind(field, known)
            if not field.has_presence:
                required.append(field.name)
        known[descriptor.name] = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"$ref": f"#/components/schemas/{descriptor.name}"}


def words(enum: Any) -> dict[int, str]:
    """Number -> word of an enum: STATUS_NO_CONSENT is "no_consent"."""
    values = enum.values
    prefix = len(values[0].name) - len("UNSPECIFIED")
    return {value.number: value.name[prefix:].lower() for value in values}


def _value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return words(field.enum_type)[value]
    return value


def _kind(field: Any, known: dict[str, Any]) -> dict[str, Any]:
    if field.message_type is not None:
        return schema(field.message_type, known)
    if field.enum_type is not None:
        return {"type": "string", "enum": list(words(field.enum_type).values())}
    if field.cpp_type in _WHOLE:
        return {"type": "integer"}
    if field.cpp_type in _BROKEN:
        return {"type": "number"}
    return {"type": "boolean" if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL else "string"}


def _is_map(field: Any) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)
