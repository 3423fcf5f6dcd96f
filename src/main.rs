//! The command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    gleaner::cli::main()
}
