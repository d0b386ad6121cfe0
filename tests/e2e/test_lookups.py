"""The lookup service beside a live worker, on real Kafka and Redis: what it says is what the stream says."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import numpy as np
import numpy.typing as npt
import pytest
import schemathesis
import xgboost
import yaml
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from hypothesis import HealthCheck, given, settings
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from schemathesis.core.result import Ok

from bench.dashboards import metrics_of, queries
from bench.generate import generate
from bench.model import labels, vectors
from bench.small_model import PLATT, manifest_of
from features.catalog import N_FEATURES, NAMES
from features.facts import KINDS, TOPICS
from models import export, graph, registry
from models.artifact import Manifest, Tables, pack
from models.session import Session
from proto.churn.v1 import churn_pb2 as pb
from streams.access import ACCESS, Group, Role
from streams.settings import Settings
from streams.topics import create, producer_config
from tests.conftest import ROOT, Servers, bare_environment, nursery
from tests.e2e.test_worker import SHARED_DATA, Deployment

pytestmark = [pytest.mark.servers, pytest.mark.slow]

KEY = "a secret of the tests that is long enough"
EVENTS = 600
EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "3"))
START_MS = 1_700_000_000_000


def token(role: str, *, key: str = KEY, **claims: Any) -> str:
    return jwt.encode({"sub": f"{role}@test", "role": role, "aud": "churnstream", "exp": time.time() + 600, **claims}, key, "HS256")


@dataclass(frozen=True)
class Lived:
    """A model fitted on the vectors of the very stream, so that what happens to a customer moves its scores."""

    booster: xgboost.Booster
    manifest: Manifest
    envelope: bytes

    @classmethod
    def on(cls, x: npt.NDArray[np.float32]) -> Lived:
        columns = np.arange(N_FEATURES)
        options = {"objective": "binary:logistic", "max_depth": 3, "eta": 0.3, "tree_method": "hist", "nthread": 1, "seed": 0}
        booster = xgboost.train(options, xgboost.DMatrix(x, label=labels(x)), 12)
        forest = export.forest_of(booster, columns, PLATT)
        onnx = graph.write(forest, N_FEATURES)
        tables = Tables(export.shares(forest, export.covers(booster)), x[:48], Session(onnx).probabilities(x[:48]))
        manifest = manifest_of(onnx, tables)
        return cls(booster, manifest, pack(manifest, onnx, tables))

    def margin(self, x: npt.NDArray[np.float32]) -> float:
        """What XGBoost itself says, calibrated."""
        return PLATT.a * float(self.booster.predict(xgboost.DMatrix(x), output_margin=True)[0]) + PLATT.b


@dataclass(slots=True)
class Client:
    """The service as its callers see it. rest: base address; worker: address of its metrics."""

    deployment: Deployment
    channel: grpc.Channel
    rest: str
    audit: Path
    worker: str
    model: Lived

    def call(self, method: str, request: Any, *, bearer: str | None = None, timeout_s: float = 10.0) -> Any:
        """The answer to one call, as admin unless a token is given."""
        described = pb.DESCRIPTOR.services_by_name["ChurnService"].methods_by_name[method]
        answer = getattr(pb, described.output_type.name)
        make = self.channel.unary_stream if described.server_streaming else self.channel.unary_unary
        stub = make(
            f"/churn.v1.ChurnService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        metadata = [] if bearer == "" else [("authorization", f"Bearer {bearer or token('admin')}")]
        return stub(request, metadata=metadata, timeout=timeout_s)

    def scores(self) -> list[dict[str, Any]]:
        return [score for rows in self.deployment.scores() for score in rows]


@pytest.fixture(scope="module")
def client(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    directory = tmp_path_factory.mktemp("lookups")
    own = f"t{directory.name}{time.time_ns() % 10**9}"
    deployed = Settings(
        kafka_bootstrap_servers=servers.kafka,
        redis_url=SecretStr(servers.redis),
        topic_prefix=f"{own}-",
        namespace=own,
        group_id=own,
    )
    opaque = [f'[[token]]\nsha256 = "{hashlib.sha256(b"opaque").hexdigest()}"\nsubject = "desk 7"\nrole = "agent"\n']
    (directory / "tokens.toml").write_text("".join(opaque))
    environment = {
        **bare_environment(),
        "KAFKA_BOOTSTRAP_SERVERS": servers.kafka,
        "REDIS_URL": servers.redis,
        "CHURN_TOPIC_PREFIX": deployed.topic_prefix,
        "CHURN_NAMESPACE": own,
        "CHURN_GROUP_ID": own,
        "CHURN_DATA_DIR": SHARED_DATA,
        "CHURN_SERVE_CLOCK": "stream",
        "CHURN_SERVE_REFLECTION": "true",
        "CHURN_SERVE_JWT_KEY": KEY,
        "CHURN_SERVE_TOKENS": str(directory / "tokens.toml"),
        "CHURN_SERVE_AUDIT": str(directory / "audit"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    create(deployed)
    generate(EVENTS, customers=40, seed=5, prefix=deployed.topic_prefix, config=producer_config(deployed), start_ms=START_MS)
    model = Lived.on(vectors(deployed, EVENTS))
    registry.publish(producer_config(deployed), deployed.prefixed("churn-models"), model.manifest, model.envelope)
    deployment = Deployment(deployed, environment, directory)
    worker = deployment.start(CHURN_METRICS_PORT=str(port))
    served = nursery().start(
        ["serve", "--grpc-port", "0", "--rest-port", "0", "--json"], environment, directory / "serve.out", directory / "serve.err"
    )
    try:
        deployment.until(lambda: b"\n" in (directory / "serve.out").read_bytes() or served.poll() is not None)
        assert served.poll() is None, (directory / "serve.err").read_text()
        where = json.loads((directory / "serve.out").read_text())
        deployment.until(lambda: deployment.count() == EVENTS)
        with grpc.insecure_channel(where["grpc"]) as channel:
            yield Client(deployment, channel, f"http://{where['rest']}", directory / "audit", f"http://127.0.0.1:{port}", model)
        served.terminate()
        assert served.wait(15) == 0, (directory / "serve.err").read_text()
    finally:
        for process in (worker, served):
            if process.poll() is None:
                process.kill()
                process.wait()


def newest(scores: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The last score of each customer."""
    last: dict[str, dict[str, Any]] = {}
    for score in sorted(scores, key=lambda one: one["cut"]["transactions"] + one["cut"]["logins"] + one["cut"]["support-tickets"]):
        last[score["customer_id"]] = score
    return last


def test_a_score_looked_up_at_its_own_time_is_the_emitted_one(client: Client) -> None:
    last = newest(client.scores())
    one_by_one = {
        customer: client.call("GetScore", pb.GetScoreRequest(customer_id=customer, at_ms=emitted["at"])).score
        for customer, emitted in list(last.items())[:5]
    }
    together = client.call("BatchGetScores", pb.BatchGetScoresRequest(customer_ids=[*last, "nobody"]))
    for customer, score in one_by_one.items():
        emitted = last[customer]
        assert score.vector_hash == emitted["vector_hash"]
        assert score.probability == emitted["probability"]
        assert pb.Band.Name(score.band) == f"BAND_{emitted['band'].upper()}"
        assert score.last.probability == emitted["probability"]
        assert score.last.at_ms == emitted["at"]
        assert score.model.digest == emitted["model_digest"]
        assert score.freshness.cut["transactions"] >= emitted["cut"]["transactions"]
        assert score.freshness.age_ms == 0
        assert score.freshness.staleness_ms < 60_000
        assert score.status == pb.STATUS_KNOWN
    assert [score.customer_id for score in together.scores] == [*last, "nobody"]
    assert together.scores[-1].status == pb.STATUS_UNKNOWN
    assert not together.scores[-1].HasField("probability")


def test_an_explanation_is_complete_and_adds_up_to_the_margin_of_xgboost(client: Client) -> None:
    for customer in list(newest(client.scores()))[:5]:
        made = client.call("Explain", pb.ExplainRequest(customer_id=customer))
        features = client.call("GetFeatures", pb.GetFeaturesRequest(customer_id=customer, at_ms=made.score.at_ms))
        assert features.vector_hash == made.score.vector_hash
        vector = np.array([[one.value if one.HasField("value") else np.nan for one in features.features]], np.float32)
        margin = client.model.margin(vector)
        assert abs(made.bias + sum(part.contribution for part in made.contributions) - margin) < 1e-5
        assert abs(made.margin - margin) < 1e-5
        assert abs(1 / (1 + np.exp(-made.margin)) - made.score.probability) < 1e-6
        assert {part.raises for part in made.contributions} == {True, False}
        assert all(part.text and part.feature in NAMES for part in made.contributions)
        sizes = [abs(part.contribution) for part in made.contributions]
        assert sizes == sorted(sizes, reverse=True)


def test_what_if_says_what_the_stream_then_says_and_a_writer_reads_what_it_wrote(client: Client) -> None:
    customer = next(iter(newest(client.scores())))
    before = client.call("GetScore", pb.GetScoreRequest(customer_id=customer)).score
    when = before.freshness.newest_ms + 86_400_000
    event: dict[str, Any] = {"kind": "payment", "amount": "49.90", "currency": "EUR", "product": "p1"}
    made = client.call("WhatIf", pb.WhatIfRequest(customer_id=customer, events=[pb.Event(event_time_ms=when, **event)]))
    assert list(made.outcomes) == ["scored"]
    assert made.before.at_ms == made.after.at_ms == when
    assert made.changes

    watching = client.call("WatchScores", pb.WatchScoresRequest(customer_ids=[customer]), timeout_s=30)
    time.sleep(1.0)  # until it follows the topic; what came before is not shown
    body = {**event, "event_id": "real", "customer_id": customer, "event_time": when}
    client.deployment.send("transactions", (customer.encode(), json.dumps(body).encode()))
    offset = before.freshness.cut["transactions"] + 1
    demand = pb.Demand(min_offset={"transactions": offset}, max_age_ms=5_000)
    score = client.call("GetScore", pb.GetScoreRequest(customer_id=customer, at_ms=when, demand=demand)).score
    assert score.vector_hash == made.after.vector_hash
    assert score.probability == made.after.probability
    assert score.freshness.cut["transactions"] >= offset
    seen = next(watching)
    watching.cancel()
    assert (seen.customer_id, seen.probability, seen.at_ms) == (customer, made.after.probability, when)

    far = pb.GetScoreRequest(customer_id=customer, demand=pb.Demand(min_offset={"transactions": offset + 1_000}))
    with pytest.raises(grpc.RpcError) as failed:
        client.call("GetScore", far, timeout_s=0.4)
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION


def test_plans_land_where_they_promise_when_their_events_really_come(client: Client) -> None:
    """The events of a plan are sent, and the stream's own score is the promised one."""
    kept = 0
    for customer in list(newest(client.scores()))[:20]:
        now = client.call("GetScore", pb.GetScoreRequest(customer_id=customer)).score
        made = client.call("Counterfactual", pb.CounterfactualRequest(customer_id=customer, below=now.probability))
        assert made.tried > 50
        assert all(plan.probability < made.below for plan in made.plans)
        if not made.plans:
            continue
        plan = made.plans[-1]
        cut = made.score.freshness.cut
        wanted: dict[str, int] = {}
        for number, event in enumerate(plan.events):
            body = {field.name: value for field, value in event.ListFields() if field.name != "event_time_ms"}
            topic = TOPICS[KINDS[event.kind] >> 3]
            wanted[topic] = wanted.get(topic, cut[topic]) + 1
            body |= {"event_id": f"plan-{number}", "customer_id": customer, "event_time": event.event_time_ms}
            client.deployment.send(topic, (customer.encode(), json.dumps(body).encode()))
        read = pb.GetScoreRequest(customer_id=customer, at_ms=plan.at_ms, demand=pb.Demand(min_offset=wanted))
        score = client.call("GetScore", read).score
        assert score.last.probability == plan.probability == score.probability
        assert score.last.at_ms == plan.at_ms
        kept += 1
        if kept == 3:
            break
    assert kept == 3


def test_features_as_known_then_are_those_of_the_score_of_then(client: Client) -> None:
    scores = [score for score in client.scores() if not score["late"]]
    for score in scores[:: len(scores) // 8]:
        request = pb.GetFeaturesRequest(customer_id=score["customer_id"], at_ms=score["at"], cut=score["cut"])
        then = client.call("GetFeatures", request)
        assert then.vector_hash == score["vector_hash"]
    history = client.call("ListHistory", pb.ListHistoryRequest(customer_id=scores[-1]["customer_id"], limit=3))
    assert len(history.facts) == 3
    assert history.facts[0].event_time_ms >= history.facts[1].event_time_ms
    older = client.call(
        "ListHistory", pb.ListHistoryRequest(customer_id=scores[-1]["customer_id"], before_ms=history.facts[-1].event_time_ms)
    )
    assert all(fact.event_time_ms < history.facts[-1].event_time_ms for fact in older.facts)


def requests() -> dict[str, Any]:
    """A sound request of every method."""
    event = pb.Event(kind="login", event_time_ms=START_MS)
    return {
        "GetScore": pb.GetScoreRequest(customer_id="c000001"),
        "BatchGetScores": pb.BatchGetScoresRequest(customer_ids=["c000001"]),
        "GetFeatures": pb.GetFeaturesRequest(customer_id="c000001"),
        "Explain": pb.ExplainRequest(customer_id="c000001"),
        "WhatIf": pb.WhatIfRequest(customer_id="c000001", events=[pb.Event(kind="login")]),
        "Counterfactual": pb.CounterfactualRequest(customer_id="c000001"),
        "ListHistory": pb.ListHistoryRequest(customer_id="c000001"),
        "ScoreHistory": pb.ScoreHistoryRequest(events=[event]),
        "WatchScores": pb.WatchScoresRequest(),
    }


def code_of(client: Client, method: str, bearer: str) -> grpc.StatusCode:
    """What a call ends with."""
    described = pb.DESCRIPTOR.services_by_name["ChurnService"].methods_by_name[method]
    try:
        answer = client.call(method, requests()[method], bearer=bearer, timeout_s=0.5 if described.server_streaming else 10)
        if described.server_streaming:
            next(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def test_the_matrix_of_methods_roles_and_bad_tokens_allows_only_the_listed_cells(client: Client) -> None:
    described = {method.name for method in pb.DESCRIPTOR.services_by_name["ChurnService"].methods}
    assert set(requests()) == set(ACCESS) == described
    bad = {
        "none": "",
        "unknown": "guess",
        "expired": token("admin", exp=time.time() - 60),
        "other key": token("admin", key="another secret that is long enough too"),
        "other audience": token("admin", aud="elsewhere"),
        "no role": token("root"),
        "unsigned": jwt.encode({"sub": "x", "role": "admin", "aud": "churnstream", "exp": time.time() + 600}, "", "none"),
    }
    for method, roles in ACCESS.items():
        found = {role for role in Role if code_of(client, method, token(role.value)) in (OK, grpc.StatusCode.DEADLINE_EXCEEDED)}
        assert found == set(roles), method
        assert {code_of(client, method, text) for text in bad.values()} == {grpc.StatusCode.UNAUTHENTICATED}, method
    assert code_of(client, "GetScore", "opaque") == OK
    assert code_of(client, "ListHistory", "opaque") == grpc.StatusCode.PERMISSION_DENIED


OK = grpc.StatusCode.OK


def test_each_role_sees_its_fields_only(client: Client) -> None:
    made = {role: client.call("Explain", requests()["Explain"], bearer=token(role.value)) for role in ACCESS["Explain"]}
    agent, analyst = made[Role.AGENT], made[Role.ANALYST]
    assert agent.score.HasField("probability")
    assert all(part.text and not part.feature and not part.HasField("contribution") for part in agent.contributions)
    assert not agent.HasField("margin")
    assert not agent.score.HasField("model")
    assert not agent.score.freshness.cut
    assert analyst.HasField("margin")
    assert analyst.score.model.digest
    engineer = client.call("GetScore", requests()["GetScore"], bearer=token("engineer")).score
    assert not engineer.HasField("probability")
    assert not engineer.HasField("last")
    assert engineer.band == pb.BAND_UNSPECIFIED
    assert engineer.model.digest
    assert Group.FACTS not in ACCESS["GetScore"][Role.ANALYST]


def test_reads_leave_a_trace_without_an_id(client: Client) -> None:
    client.call("GetScore", pb.GetScoreRequest(customer_id="c000003"), bearer="opaque")
    code_of(client, "ListHistory", "opaque")
    text = client.audit.read_text()
    assert "c000003" not in text
    last = [json.loads(line) for line in text.splitlines()][-2:]
    assert [(line["subject"], line["role"], line["method"], line["outcome"]) for line in last] == [
        ("desk 7", "agent", "GetScore", "OK"),
        ("desk 7", "agent", "ListHistory", "ROLE"),
    ]


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason"),
    [
        ("GetScore", pb.GetScoreRequest(), "INVALID_ARGUMENT", "WRONG_FIELD"),
        ("GetScore", pb.GetScoreRequest(customer_id="c", at_ms=5), "INVALID_ARGUMENT", "WRONG_FIELD"),
        ("BatchGetScores", pb.BatchGetScoresRequest(customer_ids=["c"] * 1_001), "INVALID_ARGUMENT", "WRONG_FIELD"),
        ("WhatIf", pb.WhatIfRequest(customer_id="c", events=[pb.Event(kind="dance")]), "INVALID_ARGUMENT", "WRONG_FIELD"),
        ("WhatIf", pb.WhatIfRequest(customer_id="c", events=[pb.Event(kind="payment")]), "INVALID_ARGUMENT", "WRONG_FIELD"),
        ("Explain", pb.ExplainRequest(customer_id="nobody"), "NOT_FOUND", "UNKNOWN_CUSTOMER"),
    ],
)
def test_refusals_say_what_is_wrong(client: Client, method: str, request_: Any, code: str, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        client.call(method, request_)
    assert failed.value.code() == getattr(grpc.StatusCode, code)
    status = rpc_status.from_call(failed.value)
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == (reason, "churnstream")
    if code == "INVALID_ARGUMENT":
        assert status.details[1].Is(error_details_pb2.BadRequest.DESCRIPTOR)


def test_health_is_told_and_a_large_request_is_refused(client: Client) -> None:
    stub = health_pb2_grpc.HealthStub(client.channel)
    assert stub.Check(health_pb2.HealthCheckRequest(service="churn.v1.ChurnService")).status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as failed:
        client.call("GetScore", pb.GetScoreRequest(customer_id="c" * (2 << 20)))
    assert failed.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


def test_rest_gives_the_same_answer_and_says_how_it_fares(client: Client) -> None:
    customer = next(iter(newest(client.scores())))
    headers = {"Authorization": f"Bearer {token('admin')}"}
    with httpx.Client(base_url=client.rest, headers=headers) as http:
        by_grpc = client.call("Explain", pb.ExplainRequest(customer_id=customer, at_ms=START_MS + 10**10))
        by_rest = http.get(f"/v1/customers/{customer}/explanation", params={"at_ms": START_MS + 10**10}).json()
        assert by_rest["score"]["probability"] == by_grpc.score.probability
        assert by_rest["score"]["band"] in ("low", "medium", "high")
        assert [part["feature"] for part in by_rest["contributions"]] == [part.feature for part in by_grpc.contributions]
        events = [
            {"kind": "payment", "amount": "12.50", "event_time": START_MS},
            {"kind": "opened", "priority": "high", "event_time": START_MS + 10},
        ]
        scored = http.post("/v1/score-history", json={"events": events})
        assert scored.status_code == 200, scored.text
        assert scored.json()["outcomes"] == ["scored", "scored"]
        assert http.post("/v1/score-history", json={"events": [{"kind": "payment"}]}).status_code == 400
        assert http.get(f"/v1/customers/{customer}/history", headers={"Authorization": "Bearer opaque"}).status_code == 403
        assert http.get("/livez").status_code == http.get("/readyz").status_code == 200
        assert http.get("/version").json()["model"]["digest"] == by_grpc.score.model.digest
        assert http.post("/v1/scores", content=b"x" * (2 << 20)).status_code == 413
        assert http.post("/v1/scores", content=(b"x" * 65_536 for _ in range(32))).status_code == 413
        assert "churnstream" in http.get("/").text
        assert http.get("/console/app.js").headers["content-type"].startswith("text/javascript")


def test_what_panels_and_alerts_ask_for_is_there(client: Client) -> None:
    asked = {name for query in queries() for name in metrics_of(query)}
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text("utf-8"))["groups"][0]["rules"]
    asked |= {name for rule in rules for name in metrics_of(rule["expr"])} - {"up"}
    exposed: set[str] = set()
    for address in (client.worker, client.rest):
        for family in text_string_to_metric_families(httpx.get(f"{address}/metrics").text):
            exposed |= {family.name, *(sample.name for sample in family.samples)}
            # A counter with labels is there by name before anything was counted.
            exposed |= {f"{family.name}_total"} if family.type == "counter" else set()
    assert len(asked) > 25
    assert sorted(asked - exposed) == []
    runbooks = (ROOT / "docs/runbooks.md").read_text("utf-8").lower()
    assert [rule["alert"] for rule in rules if f"## {rule['alert'].lower()}" not in runbooks] == []


def test_the_whole_openapi_document_holds(client: Client) -> None:
    document = schemathesis.openapi.from_url(f"{client.rest}/openapi.json")
    headers = {"Authorization": f"Bearer {token('admin')}"}
    tried = 0
    for result in document.get_all_operations():
        assert isinstance(result, Ok)
        operation = result.ok()

        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case: Any) -> None:
            case.call_and_validate(headers=headers)

        holds()
        tried += 1
    assert tried == 12
