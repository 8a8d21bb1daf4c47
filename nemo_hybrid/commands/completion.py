"""`--completion`: commands, options and their choices for bash and zsh; no Python runs for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

_SCRIPT = """\
if [[ -n ${{ZSH_VERSION-}} ]]; then
    autoload -Uz compinit bashcompinit && compinit -u && bashcompinit
fi
_nemo_hybrid() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    local command='' offered='' said
    for said in "${{COMP_WORDS[@]:1:$((COMP_CWORD - 1))}}"; do
        case $said in
            launch) command=launch ;;
            {names}) command=$said; break ;;
        esac
    done
    case $command in
{options}
    esac
    [[ $before != --* || $word == -* ]] || offered=''  # a value: of a file, unless it is a choice
    case $command$before in
{choices}
    esac
    COMPREPLY=($(compgen -W "$offered" -- "$word"))
}}
complete -o default -F _nemo_hybrid {prog}
"""


def script(prog: str, top: Sequence[str], commands: Mapping[str, Mapping[str, Any]]) -> str:
    """``top``: words that may stand first; ``commands``: type by option, of every command."""
    words = {"''": top, **{name: [*known, "--help"] for name, known in commands.items()}}
    choices = {
        f"{name}{option}": found
        for name, known in commands.items()
        for option, hint in known.items()
        if (found := _choices(hint))
    }
    return _SCRIPT.format(
        prog=prog,
        names="|".join(name for name in commands if name != "launch"),
        options=_cases(words),
        choices=_cases(choices),
    )


def _choices(hint: Any) -> Sequence[str]:
    if hint is bool:
        return ("true", "false")
    return get_args(hint) if get_origin(hint) is Literal else ()


def _cases(words: Mapping[str, Sequence[str]]) -> str:
    return "\n".join(
        f"        {case}) offered='{' '.join(found)}' ;;" for case, found in words.items()
    )
