from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    STATUS_UNSPECIFIED: _ClassVar[Status]
    STATUS_KNOWN: _ClassVar[Status]
    STATUS_UNKNOWN: _ClassVar[Status]
    STATUS_NEW: _ClassVar[Status]
    STATUS_STALE: _ClassVar[Status]
    STATUS_NO_CONSENT: _ClassVar[Status]
    STATUS_ERASED: _ClassVar[Status]

class Band(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BAND_UNSPECIFIED: _ClassVar[Band]
    BAND_UNKNOWN: _ClassVar[Band]
    BAND_LOW: _ClassVar[Band]
    BAND_MEDIUM: _ClassVar[Band]
    BAND_HIGH: _ClassVar[Band]
STATUS_UNSPECIFIED: Status
STATUS_KNOWN: Status
STATUS_UNKNOWN: Status
STATUS_NEW: Status
STATUS_STALE: Status
STATUS_NO_CONSENT: Status
STATUS_ERASED: Status
BAND_UNSPECIFIED: Band
BAND_UNKNOWN: Band
BAND_LOW: Band
BAND_MEDIUM: Band
BAND_HIGH: Band

class Demand(_message.Message):
    __slots__ = ("max_age_ms", "min_offset")
    class MinOffsetEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    MAX_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    MIN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    max_age_ms: int
    min_offset: _containers.ScalarMap[str, int]
    def __init__(self, max_age_ms: _Optional[int] = ..., min_offset: _Optional[_Mapping[str, int]] = ...) -> None: ...

class Freshness(_message.Message):
    __slots__ = ("newest_ms", "age_ms", "staleness_ms", "cut", "partition", "rebuilding")
    class CutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NEWEST_MS_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    STALENESS_MS_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    PARTITION_FIELD_NUMBER: _ClassVar[int]
    REBUILDING_FIELD_NUMBER: _ClassVar[int]
    newest_ms: int
    age_ms: int
    staleness_ms: int
    cut: _containers.ScalarMap[str, int]
    partition: int
    rebuilding: bool
    def __init__(self, newest_ms: _Optional[int] = ..., age_ms: _Optional[int] = ..., staleness_ms: _Optional[int] = ..., cut: _Optional[_Mapping[str, int]] = ..., partition: _Optional[int] = ..., rebuilding: _Optional[bool] = ...) -> None: ...

class Model(_message.Message):
    __slots__ = ("name", "version", "digest", "threshold_version", "layout_hash")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_VERSION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    digest: str
    threshold_version: str
    layout_hash: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., digest: _Optional[str] = ..., threshold_version: _Optional[str] = ..., layout_hash: _Optional[str] = ...) -> None: ...

class LastScore(_message.Message):
    __slots__ = ("probability", "band", "alert_band", "at_ms")
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    ALERT_BAND_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    probability: float
    band: Band
    alert_band: Band
    at_ms: int
    def __init__(self, probability: _Optional[float] = ..., band: _Optional[_Union[Band, str]] = ..., alert_band: _Optional[_Union[Band, str]] = ..., at_ms: _Optional[int] = ...) -> None: ...

class Score(_message.Message):
    __slots__ = ("customer_id", "status", "at_ms", "probability", "band", "fallback", "last", "vector_hash", "model", "freshness")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    VECTOR_HASH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    status: Status
    at_ms: int
    probability: float
    band: Band
    fallback: bool
    last: LastScore
    vector_hash: str
    model: Model
    freshness: Freshness
    def __init__(self, customer_id: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., at_ms: _Optional[int] = ..., probability: _Optional[float] = ..., band: _Optional[_Union[Band, str]] = ..., fallback: _Optional[bool] = ..., last: _Optional[_Union[LastScore, _Mapping]] = ..., vector_hash: _Optional[str] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., freshness: _Optional[_Union[Freshness, _Mapping]] = ...) -> None: ...

class GetScoreRequest(_message.Message):
    __slots__ = ("customer_id", "at_ms", "demand")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    at_ms: int
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., at_ms: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class GetScoreResponse(_message.Message):
    __slots__ = ("score",)
    SCORE_FIELD_NUMBER: _ClassVar[int]
    score: Score
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ...) -> None: ...

class BatchGetScoresRequest(_message.Message):
    __slots__ = ("customer_ids", "at_ms", "demand")
    CUSTOMER_IDS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_ids: _containers.RepeatedScalarFieldContainer[str]
    at_ms: int
    demand: Demand
    def __init__(self, customer_ids: _Optional[_Iterable[str]] = ..., at_ms: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class BatchGetScoresResponse(_message.Message):
    __slots__ = ("scores",)
    SCORES_FIELD_NUMBER: _ClassVar[int]
    scores: _containers.RepeatedCompositeFieldContainer[Score]
    def __init__(self, scores: _Optional[_Iterable[_Union[Score, _Mapping]]] = ...) -> None: ...

class GetFeaturesRequest(_message.Message):
    __slots__ = ("customer_id", "at_ms", "cut", "demand")
    class CutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    at_ms: int
    cut: _containers.ScalarMap[str, int]
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., at_ms: _Optional[int] = ..., cut: _Optional[_Mapping[str, int]] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class FeatureValue(_message.Message):
    __slots__ = ("name", "value", "text")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    name: str
    value: float
    text: str
    def __init__(self, name: _Optional[str] = ..., value: _Optional[float] = ..., text: _Optional[str] = ...) -> None: ...

class GetFeaturesResponse(_message.Message):
    __slots__ = ("customer_id", "status", "at_ms", "features", "vector_hash", "layout_hash", "freshness", "source")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    VECTOR_HASH_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_HASH_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    status: Status
    at_ms: int
    features: _containers.RepeatedCompositeFieldContainer[FeatureValue]
    vector_hash: str
    layout_hash: str
    freshness: Freshness
    source: str
    def __init__(self, customer_id: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., at_ms: _Optional[int] = ..., features: _Optional[_Iterable[_Union[FeatureValue, _Mapping]]] = ..., vector_hash: _Optional[str] = ..., layout_hash: _Optional[str] = ..., freshness: _Optional[_Union[Freshness, _Mapping]] = ..., source: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("customer_id", "at_ms", "demand")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    at_ms: int
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., at_ms: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("feature", "value", "contribution", "text", "raises")
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RAISES_FIELD_NUMBER: _ClassVar[int]
    feature: str
    value: float
    contribution: float
    text: str
    raises: bool
    def __init__(self, feature: _Optional[str] = ..., value: _Optional[float] = ..., contribution: _Optional[float] = ..., text: _Optional[str] = ..., raises: _Optional[bool] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("score", "contributions", "bias", "margin", "method")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    score: Score
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    bias: float
    margin: float
    method: str
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., bias: _Optional[float] = ..., margin: _Optional[float] = ..., method: _Optional[str] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "event_time_ms", "amount", "currency", "product", "method", "channel", "device", "country", "session_id", "feature", "duration_ms", "ticket_id", "category", "priority", "wait_seconds", "csat", "nps", "signup_date", "plan", "segment", "region", "age_band", "contract_end", "consent")
    KIND_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    CURRENCY_FIELD_NUMBER: _ClassVar[int]
    PRODUCT_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COUNTRY_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FEATURE_FIELD_NUMBER: _ClassVar[int]
    DURATION_MS_FIELD_NUMBER: _ClassVar[int]
    TICKET_ID_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CSAT_FIELD_NUMBER: _ClassVar[int]
    NPS_FIELD_NUMBER: _ClassVar[int]
    SIGNUP_DATE_FIELD_NUMBER: _ClassVar[int]
    PLAN_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    AGE_BAND_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_END_FIELD_NUMBER: _ClassVar[int]
    CONSENT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    event_time_ms: int
    amount: str
    currency: str
    product: str
    method: str
    channel: str
    device: str
    country: str
    session_id: str
    feature: str
    duration_ms: int
    ticket_id: str
    category: str
    priority: str
    wait_seconds: int
    csat: int
    nps: int
    signup_date: str
    plan: str
    segment: str
    region: str
    age_band: str
    contract_end: str
    consent: bool
    def __init__(self, kind: _Optional[str] = ..., event_time_ms: _Optional[int] = ..., amount: _Optional[str] = ..., currency: _Optional[str] = ..., product: _Optional[str] = ..., method: _Optional[str] = ..., channel: _Optional[str] = ..., device: _Optional[str] = ..., country: _Optional[str] = ..., session_id: _Optional[str] = ..., feature: _Optional[str] = ..., duration_ms: _Optional[int] = ..., ticket_id: _Optional[str] = ..., category: _Optional[str] = ..., priority: _Optional[str] = ..., wait_seconds: _Optional[int] = ..., csat: _Optional[int] = ..., nps: _Optional[int] = ..., signup_date: _Optional[str] = ..., plan: _Optional[str] = ..., segment: _Optional[str] = ..., region: _Optional[str] = ..., age_band: _Optional[str] = ..., contract_end: _Optional[str] = ..., consent: _Optional[bool] = ...) -> None: ...

class WhatIfRequest(_message.Message):
    __slots__ = ("customer_id", "events", "at_ms", "demand")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    events: _containers.RepeatedCompositeFieldContainer[Event]
    at_ms: int
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., at_ms: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class WhatIfResponse(_message.Message):
    __slots__ = ("before", "after", "changes", "outcomes")
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    before: Score
    after: Score
    changes: _containers.RepeatedCompositeFieldContainer[Contribution]
    outcomes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, before: _Optional[_Union[Score, _Mapping]] = ..., after: _Optional[_Union[Score, _Mapping]] = ..., changes: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., outcomes: _Optional[_Iterable[str]] = ...) -> None: ...

class CounterfactualRequest(_message.Message):
    __slots__ = ("customer_id", "at_ms", "below", "days", "demand")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    DAYS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    at_ms: int
    below: float
    days: int
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., at_ms: _Optional[int] = ..., below: _Optional[float] = ..., days: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("text", "events", "probability", "band", "at_ms")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    text: str
    events: _containers.RepeatedCompositeFieldContainer[Event]
    probability: float
    band: Band
    at_ms: int
    def __init__(self, text: _Optional[str] = ..., events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., probability: _Optional[float] = ..., band: _Optional[_Union[Band, str]] = ..., at_ms: _Optional[int] = ...) -> None: ...

class CounterfactualResponse(_message.Message):
    __slots__ = ("score", "below", "plans", "tried")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    BELOW_FIELD_NUMBER: _ClassVar[int]
    PLANS_FIELD_NUMBER: _ClassVar[int]
    TRIED_FIELD_NUMBER: _ClassVar[int]
    score: Score
    below: float
    plans: _containers.RepeatedCompositeFieldContainer[Plan]
    tried: int
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ..., below: _Optional[float] = ..., plans: _Optional[_Iterable[_Union[Plan, _Mapping]]] = ..., tried: _Optional[int] = ...) -> None: ...

class ListHistoryRequest(_message.Message):
    __slots__ = ("customer_id", "limit", "before_ms", "demand")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    BEFORE_MS_FIELD_NUMBER: _ClassVar[int]
    DEMAND_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    limit: int
    before_ms: int
    demand: Demand
    def __init__(self, customer_id: _Optional[str] = ..., limit: _Optional[int] = ..., before_ms: _Optional[int] = ..., demand: _Optional[_Union[Demand, _Mapping]] = ...) -> None: ...

class Fact(_message.Message):
    __slots__ = ("event_time_ms", "kind", "value", "topic", "offset")
    EVENT_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    TOPIC_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    event_time_ms: int
    kind: str
    value: int
    topic: str
    offset: int
    def __init__(self, event_time_ms: _Optional[int] = ..., kind: _Optional[str] = ..., value: _Optional[int] = ..., topic: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ListHistoryResponse(_message.Message):
    __slots__ = ("customer_id", "status", "facts", "kept_facts", "left_facts", "freshness")
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FACTS_FIELD_NUMBER: _ClassVar[int]
    LEFT_FACTS_FIELD_NUMBER: _ClassVar[int]
    FRESHNESS_FIELD_NUMBER: _ClassVar[int]
    customer_id: str
    status: Status
    facts: _containers.RepeatedCompositeFieldContainer[Fact]
    kept_facts: int
    left_facts: int
    freshness: Freshness
    def __init__(self, customer_id: _Optional[str] = ..., status: _Optional[_Union[Status, str]] = ..., facts: _Optional[_Iterable[_Union[Fact, _Mapping]]] = ..., kept_facts: _Optional[int] = ..., left_facts: _Optional[int] = ..., freshness: _Optional[_Union[Freshness, _Mapping]] = ...) -> None: ...

class ScoreHistoryRequest(_message.Message):
    __slots__ = ("events", "at_ms")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[Event]
    at_ms: int
    def __init__(self, events: _Optional[_Iterable[_Union[Event, _Mapping]]] = ..., at_ms: _Optional[int] = ...) -> None: ...

class ScoreHistoryResponse(_message.Message):
    __slots__ = ("score", "contributions", "outcomes")
    SCORE_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    score: Score
    contributions: _containers.RepeatedCompositeFieldContainer[Contribution]
    outcomes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, score: _Optional[_Union[Score, _Mapping]] = ..., contributions: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., outcomes: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchScoresRequest(_message.Message):
    __slots__ = ("bands", "min_probability", "customer_ids")
    BANDS_FIELD_NUMBER: _ClassVar[int]
    MIN_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    CUSTOMER_IDS_FIELD_NUMBER: _ClassVar[int]
    bands: _containers.RepeatedScalarFieldContainer[Band]
    min_probability: float
    customer_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bands: _Optional[_Iterable[_Union[Band, str]]] = ..., min_probability: _Optional[float] = ..., customer_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchScoresResponse(_message.Message):
    __slots__ = ("score_id", "customer_id", "at_ms", "scored_at_ms", "probability", "band", "alert_band", "late", "fallback", "reasons", "model", "skipped")
    SCORE_ID_FIELD_NUMBER: _ClassVar[int]
    CUSTOMER_ID_FIELD_NUMBER: _ClassVar[int]
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    SCORED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    BAND_FIELD_NUMBER: _ClassVar[int]
    ALERT_BAND_FIELD_NUMBER: _ClassVar[int]
    LATE_FIELD_NUMBER: _ClassVar[int]
    FALLBACK_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    score_id: str
    customer_id: str
    at_ms: int
    scored_at_ms: int
    probability: float
    band: Band
    alert_band: Band
    late: bool
    fallback: bool
    reasons: _containers.RepeatedCompositeFieldContainer[Contribution]
    model: Model
    skipped: int
    def __init__(self, score_id: _Optional[str] = ..., customer_id: _Optional[str] = ..., at_ms: _Optional[int] = ..., scored_at_ms: _Optional[int] = ..., probability: _Optional[float] = ..., band: _Optional[_Union[Band, str]] = ..., alert_band: _Optional[_Union[Band, str]] = ..., late: _Optional[bool] = ..., fallback: _Optional[bool] = ..., reasons: _Optional[_Iterable[_Union[Contribution, _Mapping]]] = ..., model: _Optional[_Union[Model, _Mapping]] = ..., skipped: _Optional[int] = ...) -> None: ...
