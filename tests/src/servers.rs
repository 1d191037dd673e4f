//! Databases with data in them and clients that load them.

use crate::daemon::{Daemon, answered, output, until};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;

/// A redis that listens on a Unix socket and writes no files.
#[derive(Debug)]
pub struct Redis {
    daemon: Daemon,
    dir: TempDir,
}

impl Redis {
    /// Starts it, and waits until it answers.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(Command::new("env"), &["--port", "0"])
    }

    /// The same through a command whose next argument is a program to become, with more options.
    ///
    /// # Panics
    /// As [`Redis::start`].
    #[must_use]
    pub fn start_in(mut command: Command, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        command.arg("redis-server").args(options);
        command.args(["--enable-debug-command", "local"]);
        command.args(["--save", "", "--appendonly", "no", "--dir"]);
        command.arg(dir.path()).arg("--unixsocket");
        let daemon = Daemon::detached(command.arg(dir.path().join("redis.sock")));
        let redis = Self { daemon, dir };
        until("redis comes up", || answered(redis.cli(&["ping"]), "PONG"));
        redis
    }

    /// Its process ID.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.daemon.pid()
    }

    /// The process.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    fn client(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-s").arg(self.dir.path().join("redis.sock"));
        command
    }

    /// What it answers.
    ///
    /// # Errors
    /// What `redis-cli` said if it failed.
    pub fn cli(&self, words: &[&str]) -> Result<String, String> {
        // Without -e, what redis refuses counts as done.
        output(self.client("redis-cli").arg("-e").args(words))
    }

    fn benchmark(&self, options: &[&str]) -> Command {
        let mut command = self.client("redis-benchmark");
        command.args(["-q", "-r", "20000"]).args(options);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Sets this many keys to 2 KiB each.
    ///
    /// # Panics
    /// If it fails.
    pub fn fill(&self, keys: u32) {
        let keys = keys.to_string();
        let options = ["-t", "set", "-n", &keys, "-d", "2048", "-P", "16"];
        let filled = self.benchmark(&options).status();
        assert!(filled.expect("it was just there").success());
    }

    /// Clients that read and write until they are dropped.
    #[must_use]
    pub fn load(&self) -> Daemon {
        Daemon::start(&mut self.benchmark(&["-t", "set,get,lpush", "-l", "-d", "100"]))
    }
}

/// A PostgreSQL with pgbench's tables, on a Unix socket.
#[derive(Debug)]
pub struct Postgres {
    daemon: Daemon,
    dir: TempDir,
    user: nix::unistd::User,
}

const POSTGRES: &str = "/usr/lib/postgresql/15/bin";

impl Postgres {
    /// Makes a database and starts it in an IPC namespace of its own, as CRIU wants its System V
    /// segment.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start() -> Self {
        Self::start_in(&Command::new("env"), "", 64, 5)
    }

    /// The same through a command whose next argument is a program to become, listening on `address`
    /// too and trusting whoever comes from there, with so many MiB of shared buffers and pgbench's
    /// tables at this scale.
    ///
    /// # Panics
    /// As [`Postgres::start`].
    #[must_use]
    pub fn start_in(through: &Command, address: &str, shared_mib: u32, scale: u32) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        // PostgreSQL does not run as root.
        let user = nix::unistd::User::from_name("postgres")
            .expect("the user database can be read")
            .expect("the package makes this user; run scripts/setup");
        nix::unistd::chown(dir.path(), Some(user.uid), Some(user.gid)).expect("we are root");
        let data = dir.path().join("data");
        let initdb = client(&user, dir.path(), "initdb")
            .arg("-D")
            .arg(&data)
            .arg("-N")
            .status();
        assert!(initdb.expect("it is there: run scripts/setup").success());
        let rules = data.join("pg_hba.conf");
        let trust = std::fs::read_to_string(&rules).expect("initdb wrote it");
        let trust = trust + "host all all 10.0.0.0/8 trust\n";
        std::fs::write(&rules, trust).expect("we are root");
        let mut server = Command::new(through.get_program());
        server.args(through.get_args());
        server.args(["unshare", "--ipc", "setpriv", "--init-groups"]);
        server.arg(format!("--reuid={}", user.uid));
        server.arg(format!("--regid={}", user.gid));
        server.arg(Path::new(POSTGRES).join("postgres"));
        server.arg("-D").arg(&data).arg("-k").arg(dir.path());
        server.args(["-h", address, "-c", "fsync=off", "-c"]);
        server.arg(format!("shared_buffers={shared_mib}MB"));
        let daemon = Daemon::detached(server.current_dir("/"));
        let postgres = Self { daemon, dir, user };
        until("PostgreSQL comes up", || {
            answered(postgres.sql("select 1"), "1")
        });
        let filled = postgres
            .client("pgbench")
            .args(["-i", "-s", &scale.to_string(), "postgres"])
            .status();
        assert!(filled.expect("it is there: run scripts/setup").success());
        postgres
    }

    /// The process ID of its postmaster.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.daemon.pid()
    }

    /// The postmaster.
    pub fn daemon(&mut self) -> &mut Daemon {
        &mut self.daemon
    }

    fn client(&self, program: &str) -> Command {
        client(&self.user, self.dir.path(), program)
    }

    /// What a query yields.
    ///
    /// # Errors
    /// What `psql` said if it failed.
    pub fn sql(&self, query: &str) -> Result<String, String> {
        let mut psql = self.client("psql");
        psql.args(["-d", "postgres", "-Atc", query]);
        output(psql.stdout(Stdio::piped()).stderr(Stdio::piped()))
    }

    /// Four clients that book until they are dropped; returns once they do.
    #[must_use]
    pub fn load(&self) -> Daemon {
        let mut pgbench = self.client("pgbench");
        let load = Daemon::start(pgbench.args(["-n", "-c", "4", "-T", "600", "postgres"]));
        let busy = "select (select count(*) > 4 from pg_stat_activity) \
                    and (select count(*) > 100 from pgbench_history)";
        until("pgbench runs", || answered(self.sql(busy), "t"));
        load
    }

    /// Claims that what pgbench keeps consistent is so.
    ///
    /// # Panics
    /// If it does not come to be.
    pub fn assert_balanced(&self) {
        let sums = "select (select sum(abalance) from pgbench_accounts) = \
                    (select sum(delta) from pgbench_history)";
        until("the books balance", || answered(self.sql(sums), "t"));
    }
}

fn client(user: &nix::unistd::User, dir: &Path, program: &str) -> Command {
    let mut command = Command::new(Path::new(POSTGRES).join(program));
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw());
    command.current_dir("/").env("PGHOST", dir);
    command.stdout(Stdio::null()).stderr(Stdio::null());
    command
}
