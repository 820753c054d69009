#!/bin/sh
# Write the files with passwords and keys that compose.yaml gives to its services, into docker/secrets/; what is there stays.
#
# HF_TOKEN in the environment goes to the worker. The services run as other users than you, so the files are readable for all,
# in a folder that only you can enter.
set -eu
umask 077
folder=$(cd "$(dirname "$0")" && pwd)/secrets
mkdir -p "$folder"
chmod 700 "$folder"

random() {
    head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n'
}

# write NAME: from standard input, whole or not at all, unless it is there.
write() {
    if [ -e "$folder/$1" ]; then
        cat >/dev/null
        echo "$folder/$1 is there and stays"
        return
    fi
    cat >"$folder/.$1"
    chmod 444 "$folder/.$1"
    mv "$folder/.$1" "$folder/$1"
    echo "wrote $folder/$1"
}

key=tokenweights
secret=$(random)
if [ -e "$folder/storage.env" ] && [ ! -e "$folder/worker.env" ]; then
    secret=$(sed -n "s/^ROOT_SECRET_KEY='\(.*\)'$/\1/p" "$folder/storage.env")
fi
random | write postgres_password
printf "ROOT_ACCESS_KEY='%s'\nROOT_SECRET_KEY='%s'\n" "$key" "$secret" | write storage.env
{
    printf "AWS_ACCESS_KEY_ID='%s'\nAWS_SECRET_ACCESS_KEY='%s'\n" "$key" "$secret"
    [ -z "${HF_TOKEN:-}" ] || printf "HF_TOKEN='%s'\n" "$(printf %s "$HF_TOKEN" | sed "s/'/'\\\\''/g")"
} | write worker.env
