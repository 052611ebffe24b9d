"""Keys: made private, kept as hashes, with names, expiry and limits; what each opens."""

import hashlib
import stat
import time
from pathlib import Path

import pytest

from cluster.endpoint.endpoint import Endpoint
from cluster.settings.serve import ServeConfig
from raymill.errors import UserError
from serving.api.access import (
    AccessRules,
    CurrentAccess,
    Headers,
    XrayAccess,
    authorize,
    presented_key,
    read_rules,
)
from serving.api.keys import ApiKey, make_key_file, read_keys
from serving.api.route_facts import OTHER, facts_by_path
from serving.protocol.errors import ApiError
from tests.serving.endpoint_parts import all_routes_of


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


FACTS = facts_by_path(all_routes_of(ServeConfig()).routes)


def granted(path: str, headers: Headers, rules: AccessRules) -> ApiKey | None:
    return authorize(path, FACTS.get(path, OTHER), headers, rules)


def keys(*words: str) -> tuple[ApiKey, ...]:
    return tuple(map(ApiKey.read, words))


def test_a_missing_key_file_is_made_with_one_private_key(tmp_path: Path) -> None:
    path = tmp_path / "new" / "keys"
    make_key_file(path)
    keys = read_keys(path)
    make_key_file(path)
    key = path.read_text().strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(key) > 40
    assert keys == (ApiKey(hashed(key), f"key-{hashed(key)[:8]}"),) == read_keys(path)


def test_an_empty_key_file_lets_nobody_in_by_mistake(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("\n \n")
    with pytest.raises(UserError, match="empty"):
        read_keys(tmp_path / "keys")


def test_what_an_editor_writes_before_the_first_key_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n", encoding="utf-8-sig")
    assert [key.hash for key in read_keys(tmp_path / "keys")] == [hashed("one"), hashed("two")]
    assert Endpoint("http://x", "", str(tmp_path / "keys")).headers == {
        "Authorization": "Bearer one"
    }


@pytest.mark.parametrize("line", ["#alice", "# alice", "  # name=alice"])
def test_a_comment_is_no_key(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"one\n{line}\n")
    with pytest.raises(UserError, match="line 2: expected a key"):
        read_keys(tmp_path / "keys")


def test_a_line_may_have_a_name_an_expiry_and_limits(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(
        "one\n  two  max_requests=8 name=alice@lab expires=2027-01-01 \n\nthree expires=2027-01-01T12:00:00+02:00\n"
        "four tokens_per_day=1000000 tokens_per_minute=20000 name=bob\nfive name=eve may=trace\n"
    )
    assert read_keys(tmp_path / "keys") == (
        ApiKey(hashed("one"), f"key-{hashed('one')[:8]}"),
        ApiKey(hashed("two"), "alice@lab", 1798761600.0, 8),
        ApiKey(hashed("three"), f"key-{hashed('three')[:8]}", 1798797600.0),
        ApiKey(hashed("four"), "bob", tokens_per_minute=20_000, tokens_per_day=1_000_000),
        ApiKey(hashed("five"), "eve", may_trace=True),
    )


@pytest.mark.parametrize(
    "words",
    [
        *("alice", "nam=alice", "name=", "name=a/b", "name=a name=b", f"name={'a' * 65}"),
        *(
            "max_requests=0",
            "max_requests=-1",
            "max_requests=many",
            "expires=tomorrow",
            "expires=2027-13-01",
        ),
        *("tokens_per_minute=0", "tokens_per_minute=1e6", "tokens_per_day=", "tokens_per_hour=9"),
        *("may=", "may=all", "trace", "may=trace may=trace"),
    ],
)
def test_a_line_that_cannot_be_read_is_named_and_not_quoted(tmp_path: Path, words: str) -> None:
    (tmp_path / "keys").write_text(f"one\nsk-secret {words}\n")
    with pytest.raises(
        UserError, match=r"keys, line 2: expected a key, and after it any of name=NAME"
    ) as caught:
        read_keys(tmp_path / "keys")
    assert "secret" not in str(caught.value)


def test_a_key_file_in_another_encoding_is_refused_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes("one\nzwei name=zoë\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"keys, line 2: expected a key") as caught:
        read_keys(tmp_path / "keys")
    assert "zwei" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "passes"),
    [
        ([b"Bearer one"], True),
        ([b"bearer two"], True),
        ([], False),
        ([b""], False),
        ([b"Bearer"], False),
        ([b"Bearer one", b"Bearer one"], False),
        ([b"Basic one"], False),
        ([b"Bearer \xff\xfe"], False),
        ([b"Bearer " + b"x" * 2**20], False),
        ([b"Bearer one,two"], False),
    ],
)
def test_only_a_known_key_passes(tmp_path: Path, values: list[bytes], passes: bool) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    headers = [(b"host", b"x"), *((b"authorization", value) for value in values)]
    key = presented_key(headers, read_keys(tmp_path / "keys"))
    assert (key is not None) is passes
    assert key in (None, *read_keys(tmp_path / "keys"))


@pytest.mark.parametrize(
    ("path", "key", "outcome"),
    [
        ("/v1/completions", "user", "user"),
        ("/v1/completions", "admin", 401),
        ("/v1/completions", None, 401),
        ("/health", None, None),
        ("/ready", "wrong", None),
        ("/metrics", None, 401),
        ("/nowhere", None, 401),
        ("/admin", None, 401),
        ("/admin/promote", "wrong", 401),
        ("/admin/promote", "user", 403),
        ("/admin/promote", "admin", "admin"),
        ("/administer", "admin", 401),
    ],
)
def test_what_a_key_opens(path: str, key: str | None, outcome: str | int | None) -> None:
    rules = AccessRules(keys("other", "user"), keys("admin"))
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    if isinstance(outcome, int):
        with pytest.raises(ApiError) as caught:
            granted(path, headers, rules)
        assert caught.value.status == outcome
    else:
        assert granted(path, headers, rules) == (outcome and ApiKey.read(outcome))


@pytest.mark.parametrize("path", ["/v1/completions", "/admin/status"])
def test_a_key_opens_nothing_once_it_has_expired(path: str) -> None:
    now_s = time.time()
    for expires_s, opens in ((now_s + 3600, True), (now_s - 1, False)):
        key = ApiKey(hashed("k"), "alice", expires_s)
        rules = AccessRules((key,), (key,))
        if opens:
            assert granted(path, [(b"authorization", b"Bearer k")], rules) == key
            continue
        with pytest.raises(ApiError, match="API key alice has expired") as caught:
            granted(path, [(b"authorization", b"Bearer k")], rules)
        assert (caught.value.status, caught.value.code) == (401, "expired_api_key")
        assert caught.value.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("users", [(), keys("user")])
def test_without_admin_keys_there_is_no_admin(users: tuple[ApiKey, ...]) -> None:
    with pytest.raises(ApiError) as caught:
        granted("/admin/promote", [(b"authorization", b"Bearer user")], AccessRules(users))
    assert caught.value.status == 404
    assert (
        granted("/v1/models", [(b"authorization", b"Bearer user")], AccessRules(users))
        == (users or (None,))[0]
    )


def test_a_key_is_for_users_or_for_admins(tmp_path: Path) -> None:
    (tmp_path / "user").write_text("one\ntwo\n")
    (tmp_path / "admin").write_text("two\n")
    with pytest.raises(UserError, match="opens /admin only"):
        read_rules(
            ServeConfig(api_key_file=str(tmp_path / "user"), admin_key_file=str(tmp_path / "admin"))
        )


class Files:
    """The key files of an endpoint, and the rules that follow them."""

    def __init__(self, folder: Path) -> None:
        self.user, self.admin = folder / "user", folder / "admin"
        self.user.write_text("one\ntwo\n")
        self.admin.write_text("root\n")
        rules = read_rules(ServeConfig(api_key_file=str(self.user), admin_key_file=str(self.admin)))
        self.access = CurrentAccess(rules, user_file=str(self.user), admin_file=str(self.admin))

    def opened(self, *keys: str) -> list[bool]:
        """By each of `keys`, after the files were looked at."""
        self.access.reload()
        rules = self.access.rules
        return [
            presented_key([(b"authorization", f"Bearer {key}".encode())], known) is not None
            for key in keys
            for known in [rules.admin_keys if key.startswith("root") else rules.user_keys]
        ]


def test_keys_are_added_and_revoked_as_the_files_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = Files(tmp_path)
    assert files.opened("one", "two", "three", "root", "root2") == [True, True, False, True, False]
    files.user.write_text("two\nthree\n")
    assert files.opened("one", "two", "three", "root") == [False, True, True, True]
    (tmp_path / "new").write_text("root2\n")
    (tmp_path / "new").rename(files.admin)  # as Kubernetes replaces a Secret's files
    assert files.opened("two", "root", "root2") == [True, False, True]
    assert "the API keys have changed: 2 for users and 1 for admins now" in caplog.text
    assert "three" not in caplog.text and hashed("three") not in caplog.text


@pytest.mark.parametrize("content", [None, b"", b"\n \n", b"\xff\xfe", b"root\n"], ids=ascii)
def test_a_bad_key_file_keeps_the_keys_from_before_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    files = Files(tmp_path)
    assert files.opened("one", "root") == [True, True]
    files.user.unlink()
    if content is not None:
        files.user.write_bytes(content)
    for _ in range(3):
        assert files.opened("one", "two", "", "root") == [True, True, False, True]
    files.admin.write_text("root2\n")
    if content != b"root\n":
        assert files.opened("one", "root", "root2") == [True, False, True]
    assert caplog.text.count("Its keys from before stay valid") == 1 and files.user.exists() is (
        content is not None
    )
    files.user.write_text("three\n")
    assert files.opened("one", "three", "root2") == [False, True, True]


def test_a_machine_without_the_files_keeps_the_keys_that_it_was_given(tmp_path: Path) -> None:
    rules = AccessRules(keys("one"), keys("root"))
    access = CurrentAccess(
        rules, user_file=str(tmp_path / "user"), admin_file=str(tmp_path / "admin")
    )
    access.reload()
    assert access.rules == rules and not (tmp_path / "user").exists()


def test_without_key_files_nothing_is_read(tmp_path: Path) -> None:
    access = CurrentAccess(AccessRules())
    access.reload()
    assert access.rules == AccessRules()


@pytest.mark.parametrize(
    ("xray", "path", "key", "status"),
    [
        ("user", "/v1/xray", "user", 200),
        ("user", "/v1/xray", "root", 401),
        ("admin", "/v1/xray", "root", 200),
        ("admin", "/v1/models", "root", 200),
        ("admin", "/v1/xray", "user", 403),
        ("admin", "/v1/xray", "wrong", 401),
        ("admin", "/v1/chat/completions", "root", 200),
        ("admin", "/version", "root", 200),
        ("user", "/version", "root", 401),
        ("admin", "/v1/embeddings", "root", 401),
        ("admin", "/inside", None, 200),
        ("off", "/v1/xray", "user", 404),
        ("off", "/inside", None, 404),
        ("off", "/page/attention.js", None, 404),
        ("off", "/page/api.js", None, 200),
        ("off", "/", None, 200),
        ("off", "/chat/chat.js", None, 200),
        ("off", "/v1/completions", "user", 200),
    ],
)
def test_who_may_look_inside_a_query(
    xray: XrayAccess, path: str, key: str | None, status: int
) -> None:
    rules = AccessRules(keys("user"), keys("root"), xray)
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    try:
        granted(path, headers, rules)
    except ApiError as error:
        assert error.status == status
    else:
        assert status == 200


@pytest.mark.parametrize(
    ("traces", "key", "status"),
    [
        (True, "reader", 200),
        (True, "auditor", 200),
        (True, "user", 403),
        (True, "root", 403),
        (True, "wrong", 401),
        (True, None, 401),
        (False, "wrong", 401),
    ],
)
def test_who_may_see_what_the_model_was_trained_on(
    traces: bool, key: str | None, status: int
) -> None:
    users, admins = keys("user", "reader may=trace"), keys("root", "auditor may=trace")
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    rules = AccessRules(users, admins, traces=traces)
    try:
        key_granted = granted("/v1/trace", headers, rules)
    except ApiError as error:
        assert error.status == status
    else:
        assert status == 200 and key_granted is not None and key_granted.may_trace
    without_users = AccessRules((), admins, traces=True)
    with pytest.raises(ApiError) as refused:  # where other routes need no key
        granted("/v1/trace", [], without_users)
    assert refused.value.status == 401


def test_an_operators_page_may_send_its_bodies() -> None:
    rules = AccessRules(keys("user"), keys("root"), "admin")
    assert granted("/version", [(b"authorization", b"Bearer root")], rules) is not None


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", "user"), ("0.0.0.0", "admin")])
def test_users_look_inside_by_themselves_on_loopback_only(
    host: str, expected: str, tmp_path: Path
) -> None:
    settings = {"host": host, "api_key_file": str(tmp_path / "keys")}
    assert read_rules(ServeConfig.model_validate(settings)).xray == expected
    assert read_rules(ServeConfig.model_validate(settings | {"xray": "off"})).xray == "off"


def test_without_admin_keys_only_the_setting_opens_the_x_ray() -> None:
    with pytest.raises(ApiError, match="xray to user") as refused:
        granted(
            "/v1/xray", [(b"authorization", b"Bearer user")], AccessRules(keys("user"), (), "admin")
        )
    assert refused.value.status == 403
