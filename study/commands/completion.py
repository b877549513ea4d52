"""Shell completion: click's script for `run.py`, and after it lines that complete `uv run run.py` too."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_PROGRAM, _VARIABLE = "run.py", "_RUN_PY_COMPLETE"

# What follows click's script. Each calls the run.py of the command line through uv, and leaves uv's other commands to uv's own completion.
_WITH_UV = {
    "bash": """
_runpy_uv_completion() {
    if [[ ${COMP_WORDS[1]} == run && ${COMP_WORDS[2]##*/} == run.py && $COMP_CWORD -gt 2 ]]; then
        local script=${COMP_WORDS[2]}
        COMP_WORDS=(run.py "${COMP_WORDS[@]:3}")
        ((COMP_CWORD -= 2))
        _runpy_completion $'uv\\nrun\\n'"$script"
    elif declare -F _uv >/dev/null; then
        _uv "$@"
    fi
}
complete -o nosort -o bashdefault -o default -F _runpy_uv_completion uv
""",
    "zsh": """
_runpy_uv_completion() {
    if [[ $words[2] == run && ${words[3]:t} == run.py ]] && (( CURRENT > 3 )); then
        local runpy="uv run $words[3]"
        words=(run.py "${(@)words[4,-1]}")
        (( CURRENT -= 2 ))
        _runpy_completion
    elif (( $+functions[_uv] )); then
        _uv "$@"
    else
        _files
    fi
}
compdef _runpy_uv_completion uv
""",
    "fish": """
function _runpy_uv_completion
    set -l words (commandline -cpo)
    set -l line (commandline -cp | string replace -r '^\\\\s*uv\\\\s+run\\\\s+\\\\S+' run.py)
    env _RUN_PY_COMPLETE=fish_complete COMP_WORDS="$line" COMP_CWORD=(commandline -t) uv run $words[3] | while read -l completion
        set -l metadata (string split -m 1 "," $completion)
        switch $metadata[1]
            case dir
                __fish_complete_directories $metadata[2]
            case file
                __fish_complete_path $metadata[2]
            case plain
                echo $metadata[2]
        end
    end
end
complete --no-files --command uv --condition 'string match -qr "^\\\\s*uv\\\\s+run\\\\s+\\\\S*run\\\\.py\\\\s" -- (commandline -cp)' \\
    --arguments "(_runpy_uv_completion)"
""",
}
SHELLS = tuple(_WITH_UV)


def completion_script(cli: click.Command, shell: str) -> str:
    """The script that a shell reads to complete run.py's commands, options and names."""
    completion = get_completion_class(shell)
    assert completion
    script = completion(cli, {}, _PROGRAM, _VARIABLE).source()
    if shell == "zsh":  # click's calls the program by name, and only if it is on the PATH
        by_name, when_there = f"{_PROGRAM})}}", f"(( ! $+commands[{_PROGRAM}] )) && return 1\n"
        script = script.replace(when_there, "").replace(by_name, f"${{=runpy:-{_PROGRAM}}})}}")
    return script + _WITH_UV[shell]
