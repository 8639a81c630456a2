from onward.data.templates.rendering import Renderer


def test_templates_that_only_write_contents_are_proven_once() -> None:
    """They may look whether there is a text, of which type it is, and for pieces of text in it; the words are marks."""
    for test, weighs in {
        "m.content": False, "m.content is string": False, "m.content|trim|length > 0": False,
        "m['content'] is not none and not m.tool_calls": False, "m.content.split('</think>')[-1]": False,
        "'yes' in m.content": False, "m.content|length > 5": True, "m.content[0] == 'x'": True, "m.content|int": True,
    }.items():  # fmt: skip
        reads = Renderer(
            f"{{% for m in messages %}}{{% if {test} %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}", {}
        ).reads()
        assert (test, weighs) == (test, reads.weighs)
        assert ("yes" in test) == ("yes" in reads.marks)
