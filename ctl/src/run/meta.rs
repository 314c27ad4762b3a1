//! Completions and manual pages, from the same command line that is parsed.

use std::io;
use std::path::Path;

use hearth_protocol::rpc::{Failure, FailureKind};

use crate::Outcome;
use crate::output;

pub fn completions(shell: clap_complete::Shell) {
    let mut command = crate::command();
    clap_complete::generate(shell, &mut command, "hearth", &mut io::stdout());
}

pub fn man(dir: Option<&Path>) -> Outcome {
    let failed = |what: String| {
        move |error: io::Error| Failure::new(FailureKind::Failed, format!("cannot write {what}: {error}"), "")
    };
    match dir {
        None => clap_mangen::Man::new(crate::command())
            .render(&mut io::stdout())
            .map_err(failed("the manual page".into())),
        Some(dir) => {
            let shown = dir.display().to_string();
            std::fs::create_dir_all(dir)
                .and_then(|()| clap_mangen::generate_to(crate::command(), dir))
                .map_err(failed(format!("manual pages into {shown}")))?;
            output::note(&format!("manual pages are in {shown}: man -l {shown}/hearth.1"));
            Ok(())
        }
    }
}
