//! The `hearth` command: see `hearth --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    hearth_ctl::main()
}
