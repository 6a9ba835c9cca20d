import dataclasses
import json
import shlex

from server.announcement import describe_start
from server.config import ServerConfig
from server.served_model import ServedModel
from tests.server.fakes import FACTS


def test_the_line_to_paste_is_one_for_any_name_of_the_model(served: ServedModel) -> None:
    model = dataclasses.replace(served, name='it\'s "mine"')

    *_, line = describe_start("http://x:1", FACTS, model, ServerConfig())

    assert json.loads(shlex.split(line)[-1])["model"] == model.name
