//! One long-running child process: started, watched, restarted and, in any case, ended by us.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process;
use crate::step::note;
use crate::wait;

/// Time a process gets to end in order before it is killed.
const STOP_WITHIN: Duration = Duration::from_secs(15);

/// Lines of a process's log that an error shows.
const LOG_LINES_SHOWN_MAX: usize = 25;

/// A child process with its log file; ended when dropped.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    log: PathBuf,
    child: Child,
}

impl Daemon {
    /// Starts `command` with its output appended to `log`.
    ///
    /// # Errors
    /// The log cannot be opened, or the program not started.
    pub fn start(name: impl Into<String>, command: &mut Command, log: &Path) -> Result<Self> {
        let name = name.into();
        let open = || -> Result<File> {
            OpenOptions::new()
                .create(true)
                .append(true)
                .open(log)
                .with_context(|| format!("cannot open the log {}", log.display()))
        };
        command
            .stdin(Stdio::null())
            .stdout(open()?)
            .stderr(open()?)
            // A daemon's last words are its error, not where in its code that was made.
            .env("RUST_BACKTRACE", "0")
            // Ctrl-C reaches only us; we then end the children in their order.
            .process_group(0);
        // SAFETY: prctl is async-signal-safe and touches no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                // If we are killed, nobody else would end the child.
                if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) == -1 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name}: `{}`", process::shown(command)))?;
        Ok(Self {
            name,
            log: log.to_owned(),
            child,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log file.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, for errors.
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let text = text.unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES_SHOWN_MAX)..].join("\n")
    }

    /// Fails if it has ended.
    ///
    /// # Errors
    /// It ended; the end of its log is in the text.
    pub fn check_running(&mut self) -> Result<()> {
        match self
            .child
            .try_wait()
            .with_context(|| format!("cannot look after {}", self.name))?
        {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}:\n{}", self.name, self.log_tail()),
        }
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It runs on after `within`, or Ctrl-C.
    pub fn wait(&mut self, within: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait::until(&format!("{name} to end"), within, || Ok(self.child.try_wait()?))
    }

    /// Sends it a signal, by its process id.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&mut self, signal: libc::c_int) -> Result<()> {
        self.check_running()?;
        let pid = libc::pid_t::try_from(self.child.id()).context("a process id that does not fit")?;
        // SAFETY: kill touches no memory; the child is not reaped yet, so the id is still its own.
        if unsafe { libc::kill(pid, signal) } == -1 {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot signal {}", self.name));
        }
        Ok(())
    }

    /// Asks it to end, and kills it if it does not.
    ///
    /// # Errors
    /// It ended with a failure, or had to be killed.
    pub fn stop(&mut self) -> Result<()> {
        self.signal(libc::SIGTERM)?;
        let start = std::time::Instant::now();
        // Not `wait::until`: this also runs after Ctrl-C.
        while start.elapsed() < STOP_WITHIN {
            if let Some(status) = self.child.try_wait()? {
                let by_our_signal = std::os::unix::process::ExitStatusExt::signal(&status) == Some(libc::SIGTERM);
                if status.success() || by_our_signal {
                    return Ok(());
                }
                bail!("{} ended with {status}:\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill()?;
        bail!(
            "{} did not end within {} s of SIGTERM and was killed",
            self.name,
            STOP_WITHIN.as_secs()
        )
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// The operating system refuses.
    pub fn kill(&mut self) -> Result<()> {
        self.child
            .kill()
            .with_context(|| format!("cannot kill {}", self.name))?;
        self.child
            .wait()
            .with_context(|| format!("cannot wait for {}", self.name))?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None))
            && let Err(error) = self.stop()
        {
            note(format!("{error:#}"));
        }
    }
}
